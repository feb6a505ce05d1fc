"""Whole runs as processes: their trackers, their records, their last lines."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_pretrain.train.provenance import Provenance
from gpt_pretrain.train.writers.wandb_rows import records_in

REPO = pathlib.Path(__file__).parent.parent


def shell(command: str, **env: str) -> str:
    """Runs a line as a user types it; its output. It must end well."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env = {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline", "HOME": "/nonexistent", **env}
    xla_flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=REPO,
        env=clean | {"XLA_FLAGS": xla_flags} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    return output


def line_of(output: str, name: str) -> str:
    """What the last lines tell to type, as it stands there, to the line's end."""
    return next(line.split(":", 1)[1].strip() for line in output.splitlines() if line.startswith(f"  {name}:"))


@pytest.fixture(scope="module")
def first(tiny_dataset, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run of 8 steps that is complete; its save_dir and output. Its output streams are ASCII."""
    save_dir = tmp_path_factory.mktemp("runs") / "it's a run"
    output = shell(
        f"{sys.executable} -m gpt_pretrain.main --data_dir='{tiny_dataset}' --batch_size=4 --seq_len=16 "
        "--num_tokens=512 --model.n_layer=2 --model.n_head=2 --model.n_embd=32 --model.vocab_size=264 "
        "--save_interval=4 --gin_param='train.sample_tokens = 2' --gin_param='train.statistics_interval = 4' --gin_param='train.log_interval = 2' "
        f"""--gin_param='train.sample_prompt = "é 日"' --optimizer.lr=0.01 --save_dir="{save_dir}" """,
        PYTHONIOENCODING="ascii",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    return save_dir, output


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The same run, trained on as its last line says, with another peak rate."""
    save_dir, output = first
    command = line_of(output, "train on").split("   #")[0] + " --optimizer.lr=0.02"
    return save_dir, shell(
        command,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def wandb_records(save_dir) -> list:
    files = sorted(pathlib.Path(save_dir).glob("wandb/offline-run-*/*.wandb"))
    return [record for file in files for record in records_in(file)]


def test_a_print_ends_no_run(first):
    save_dir, output = first
    assert "--- a sample ---\n\\xe9 \\u65e5" in output and "Done at step 8 of 8" in output
    assert '"é 日"' in (save_dir / "config.gin").read_text(encoding="utf-8").replace("'", '"')


def test_the_last_lines_work_as_printed(first, second):
    save_dir, output = first
    assert "Done at step 16 of 16" in second[1]
    assert shell(line_of(output, "sample") + " --num_tokens=4")
    printed = line_of(output, "curves").split("   #")[0]
    folder = subprocess.run(["sh", "-c", printed.replace("tensorboard --logdir=", "printf %s ")], capture_output=True)
    assert folder.stdout.decode() == str(save_dir / "tensorboard")


def test_wandb_has_one_row_a_logged_step(second):
    save_dir, _ = second
    steps, rows = [], {}
    for record in wandb_records(save_dir):
        if record.WhichOneof("record_type") == "history":
            row = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item}
            steps.append(row["_step"])
            rows[row["_step"]] = row
    assert steps == [1, 2, 4, 6, 8, 9, 10, 12, 14, 16]
    assert any(name.startswith("statistics/") for name in rows[12]) and "train/loss" in rows[12]
    assert {"train/loss", "validation/loss", "step"} <= rows[16].keys()


def test_trackers_and_the_run_hold_a_nested_configuration_and_the_provenance(second, tiny_dataset):
    save_dir, _ = second
    provenance = Provenance.read(save_dir)
    manifest = json.loads(pathlib.Path(tiny_dataset, "manifest.json").read_text())
    assert provenance.datasets["data"].fingerprint == manifest["fingerprint"]
    assert provenance.datasets["data"].directory == os.path.realpath(tiny_dataset)
    assert (provenance.num_devices, provenance.mesh, provenance.total_steps) == (1, {"data": 1, "fsdp": 1}, 16)
    assert provenance.num_params == 264 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert {"jax", "flax"} <= provenance.versions.keys() and re.fullmatch(r"3\.\d+\.\d+", provenance.python)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout.strip()
    assert (provenance.code.commit if provenance.code else "") == head
    settings = {}
    for record in wandb_records(save_dir):
        if record.WhichOneof("record_type") == "config":
            settings |= {each.key: json.loads(each.value_json) for each in record.config.update}
    assert settings["provenance"] == provenance.to_json()
    assert settings["train"]["batch_size"] == 4 and settings["data"]["seq_len"] == 16
    assert settings["model"]["n_embd"] == 32 and settings["optimizer"]["lr"] == 0.02
    events = EventAccumulator(str(save_dir / "tensorboard")).Reload()
    text = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert manifest["fingerprint"] in text and '"n_embd": 32' in text
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in hparams and b"provenance.num_params" in hparams


def test_changed_settings_are_announced_and_recorded(first, second):
    save_dir, output = second
    assert "Settings that change after step 8:" in output and "Settings that change" not in first[1]
    assert "optimizer.lr: 0.01 until now, 0.02 from here on" in output
    assert output.count("until now") == 2  # and the tokens
    (line,) = (save_dir / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["changes"] == {
        "optimizer.lr": {"before": 0.01, "after": 0.02},
        "train.num_tokens": {"before": 512, "after": 1024},
    }
