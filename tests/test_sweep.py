"""Sweeps of Weights & Biases: what its agent would run, run."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml
from support.training_runs import REPO, environment, flags
from wandb import wandb_agent

from gpt_pretrain import main, settings
from gpt_pretrain.flags import bindings_of
from gpt_pretrain.train.writers.wandb_rows import ID_FILE_NAME, check_trial, records_in

SWEEP = yaml.safe_load((REPO / "configs" / "sweep.yaml").read_text(encoding="utf-8"))
CHOSEN = {"optimizer.lr": 1e-05, "optimizer.schedule": "wsd", "optimizer.warmup_steps": 3}


def agents_command(monkeypatch, directory, *, trial: str, chosen=CHOSEN, command=None) -> tuple[list[str], dict]:
    """The command and the environment with which W&B's own agent starts a trial, in `directory`."""
    started = []

    class Process:
        def __init__(self, *, env, command, forward_signals):
            started.append((command, env))

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    monkeypatch.chdir(directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", os.environ | {"WANDB_SWEEP_ID": "asweep"})
        agent = wandb_agent.Agent(None, None, sweep_id="asweep")
        agent._sweep_command = list(command or SWEEP["command"])
        args = {name: {"value": value} for name, value in chosen.items()}
        agent._command_run({"run_id": trial, "program": SWEEP["program"], "args": args})
    ((command, env),) = started
    return command, env


def test_the_command_of_the_example_gives_each_trial_its_settings_and_a_directory_of_its_own(monkeypatch, tmp_path):
    command, env = agents_command(monkeypatch, tmp_path, trial="trial7")
    python = tmp_path / "python"  # prints what it was called with
    python.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n"
    )
    python.chmod(0o755)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    module, name, *arguments = json.loads(said)
    assert (module, name) == ("-m", "gpt_pretrain.main")
    args = main.make_parser().parse_args(arguments)
    monkeypatch.chdir(REPO)
    settings.parse(args.gin_file, bindings_of(args))
    config = settings.train_config()
    assert config.save_dir == "runs/sweep/trial7" and "wandb" in config.writers
    values = settings.values_of(config.bound_config())
    assert {name: values[name] for name in CHOSEN} == CHOSEN
    assert config.optimizer(900).learning_rate(2) == pytest.approx(1e-05)


@pytest.mark.parametrize(
    ("given", "binding"),
    [
        ("optimizer.schedule=wsd", "optimizer.schedule = 'wsd'"),
        ("optimizer.schedule='wsd'", "optimizer.schedule = 'wsd'"),
        ("optimizer.lr=1e-05", "optimizer.lr = 1e-05"),
        ("train.fork=True", "train.fork = True"),
        ("train.per_device_batch_size=None", "train.per_device_batch_size = None"),
        ("train.writers=['console', 'wandb']", "train.writers = ['console', 'wandb']"),
        ("data.mixture={'web': ('data/web', 7)}", "data.mixture = {'web': ('data/web', 7)}"),
        ("train.optimizer=@adamw", "train.optimizer = @adamw"),
        ("train.save_dir=runs/a=b it's", 'train.save_dir = "runs/a=b it\'s"'),
    ],
)
def test_a_setting_as_sweeps_pass_it_is_a_binding(given, binding):
    assert bindings_of(main.make_parser().parse_args(["--gin_param=a.b=1", given])) == ["a.b=1", binding]


@pytest.mark.parametrize("given", ["configs/quickstart.gin", "=3", ""])
def test_what_is_no_setting_is_refused_in_one_line(given, capsys):
    with pytest.raises(SystemExit) as stop:
        main.make_parser().parse_args([given])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "expected NAME=VALUE" in said


def test_a_trial_in_the_directory_of_another_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "second")
    (tmp_path / ID_FILE_NAME).write_text("first\n")
    check_trial(tmp_path, tmp_path)  # no sweep: the directory's own id counts
    monkeypatch.setenv("WANDB_SWEEP_ID", "asweep")
    with pytest.raises(ValueError, match=r"train\.save_dir=.*has W&B run first, expected second of this sweep\. Each"):
        check_trial(tmp_path, tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    check_trial(tmp_path, tmp_path)


def wandb_runs(save_dir) -> list:
    """What the offline folders say of their runs, in order."""
    files = sorted(pathlib.Path(save_dir).glob("wandb/offline-run-*/*.wandb"))
    return [record.run for file in files for record in records_in(file) if record.WhichOneof("record_type") == "run"]


@pytest.mark.slow
def test_a_trial_keeps_the_id_that_its_agent_gave_over_a_restart(monkeypatch, tiny_dataset, tmp_path):
    run_flags = shlex.join(flags(tiny_dataset, "ignored", num_steps=8, **{"train.writers": ("console", "wandb")}))
    script = SWEEP["command"][2].replace("--gin_file=configs/quickstart.gin", run_flags)
    script = script.replace("exec python", f"exec {shlex.quote(sys.executable)}")
    script = script.replace("""--gin_param='train.writers = ("console", "tensorboard", "wandb")'""", "")
    command = ["sh", "-c", script, *SWEEP["command"][3:]]
    for steps in (8, 16):
        chosen = {"optimizer.lr": 0.005, "optimizer.schedule": "constant", "train.num_tokens": steps * 256}
        started, env = agents_command(monkeypatch, tmp_path, trial="trial7", chosen=chosen, command=command)
        env = environment() | {name: value for name, value in env.items() if name.startswith("WANDB")}
        done = subprocess.run(
            started, env=env | {"WANDB_MODE": "offline", "HOME": "/nonexistent"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Done at step {steps}" in done.stdout and "Ignoring" not in done.stdout + done.stderr
    save_dir = tmp_path / "runs" / "sweep" / "trial7"
    assert (save_dir / ID_FILE_NAME).read_text() == "trial7"
    found = wandb_runs(save_dir)
    assert {(each.run_id, each.sweep_id) for each in found} == {("trial7", "asweep")} and len(found) == 2
    config = {each.key: json.loads(each.value_json) for each in found[0].config.update}
    assert config["optimizer.lr"] == 0.005
