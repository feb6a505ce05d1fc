"""The command line as a user types it, in processes of its own where that is what counts."""

import re
import shutil
import signal
import subprocess
import sys
import time

import gin
import pytest
from support.shared import made_once
from support.training_runs import (
    REPO,
    assert_bitwise_equal,
    consumed_batches,
    environment,
    final_state,
    finish,
    flags,
    start,
    train_here,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_pretrain import generate, main, settings
from gpt_pretrain.flags import bindings_of
from gpt_pretrain.model import interventions
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.provenance import Provenance


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], env=environment(), text=True, capture_output=True, **kwargs)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom gpt_pretrain import main\n"
        "try: main.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('jax', 'flax', 'numpy', 'gin', 'wandb', 'tensorflow_datasets') if m in sys.modules])"
    )
    output = python(code).stdout
    assert "--model.n_layer" in output and "[]" in output.splitlines()[-1]


def test_each_shorthand_is_nothing_but_a_gin_binding():
    args = main.make_parser().parse_args(
        [
            "--model.n_layer=6",
            "--batch_size=8",
            "--optimizer.lr=1e-3",
            "--num_tokens=1e9",
            "--data_dir=a b",
            "--from_pretrained=x",
            "--gin_param=model.n_embd = 64",
            "--save_interval=7",
            "--seq_len=9",
        ]
    )
    assert bindings_of(args) == [
        "model.n_embd = 64",
        "model.n_layer = 6",
        "train.batch_size = 8",
        "data.seq_len = 9",
        "train.num_tokens = 1000000000",
        "optimizer.lr = 0.001",
        "data.dir = 'a b'",
        "train.save_interval = 7",
        "train.from_pretrained = 'x'",
    ]


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.gin")), ids=lambda path: path.stem)
def test_every_config_parses_and_makes_a_model(path):
    settings.parse([str(path)], [])
    assert gin.get_configurable("model")().n_layer >= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gin_param=model.n_layers = 3"], r"doesn't have a parameter named 'n_layers'"),
        (["--batch_size=9"], r"batch_size=9 is not a whole number of microbatches.*= 4 rows at once, 9 / 4 = 2\.25"),
    ],
)
def test_mistakes_are_named_before_work_starts(tiny_dataset, tmp_path, arguments, message):
    output = finish(start([*flags(tiny_dataset, tmp_path / "run"), *arguments]), expect=1)
    assert re.search("error: .*" + message, output, re.DOTALL), output
    assert "Traceback" not in output and "step  1/" not in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gin_param=modell.n_layer = 3"], r"modell"),
        (["--gin_param=train.command = 'x'"], r"command"),
        (["--gin_file=nowhere.gin"], r"nowhere\.gin"),
        (["--model.n_embd=101"], r"model\.n_embd=101 is not divisible by model\.n_head=2: 101 / 2 = 50\.50"),
        (["--data_dir=nowhere"], r"nowhere: not a prepared dataset"),
        (["--gin_param=mesh.fsdp = 3"], r"fsdp=3 does not make the 4 devices"),
        (["--gin_param=train.writers = ('consol',)"], r"train\.writers: no such writer \['consol'\]"),
        (["--gin_param=optimizer.warmup_steps = 99"], r"warmup_steps: found 99, expected fewer than the 40 steps"),
        (["--save_dir=http://host/run"], r"train\.save_dir: http://host/run is a URL"),
    ],
)
def test_settings_that_gin_or_a_part_of_the_run_refuses_end_it_with_one_line(
    tiny_dataset, tmp_path, arguments, message
):
    output = train_here([*flags(tiny_dataset, tmp_path / "run"), *arguments], expect=1)
    assert re.search("error: .*" + message, output), output
    assert "In call to configurable" not in output and "step  1/" not in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_processes_that_are_not_all_named_are_a_mistake(capsys):
    assert main.main(["--num_processes=2"]) == 2
    assert "belong together" in capsys.readouterr().err


STORY = {
    "train.writers": ("console", "tensorboard"),
    "train.eval_interval": 5,
    "train.statistics_interval": 6,
    "train.sample_prompt": "'the cat'",
    "train.log_interval": 4,
    "model.remat": "'dots'",
    "train.num_tokens": 12.0 * 8 * 32,
}


def test_a_run_tells_its_story_and_its_curves_and_config_are_where_it_says(tiny_dataset, tmp_path):
    output = train_here(flags(tiny_dataset, tmp_path / "run", **STORY))
    for expected in (
        "Unigram entropy of the training data: 2.",
        "compute in float32, attention by xla",
        "2 microbatch(es) x 4 devices x 1",
        "step  1/12",
        "step  4/12",
        "step 10/12 | validation loss",
        "step 12/12 | validation loss",
        "step  6/12 | statistics: ",
        "tok/s",
        "ETA",
        "--- a sample ---\nthe cat",
        "Done at step 12 of 12 (96 examples)",
        "python -m gpt_pretrain.generate --checkpoint=",
    ):
        assert expected in output, f"{expected!r} not in:\n{output}"
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    tags = set(curves.Tags()["scalars"])
    names = ("loss", "accuracy", "learning_rate", "grad_norm", "param_norm", "update_norm", "tokens_per_sec")
    assert {f"train/{name}" for name in (*names, "examples_seen")} <= tags
    assert {"validation/loss", "statistics/activations/1/mlp_out/rms", "statistics/gradients/layers/0"} <= tags
    assert [e.step for e in curves.Scalars("validation/loss")] == [5, 10, 12]
    assert "model.n_embd = 32" in (tmp_path / "run" / "config.gin").read_text()
    assert "tensorflow" not in output.lower()


@pytest.fixture(scope="session")
def finished_run(tiny_dataset, tmp_path_factory):
    """(save_dir, output) of a run that has learnt something."""

    def make(directory):
        arguments = flags(tiny_dataset, directory / "run", num_steps=40, **{"train.save_interval": 0})
        (directory / "output").write_text(train_here(arguments))

    directory = made_once(tmp_path_factory, "finished_run", make)
    return directory / "run", (directory / "output").read_text()


@pytest.mark.slow
def test_started_again_when_complete_it_says_so_and_a_longer_run_goes_on(finished_run, tiny_dataset, tmp_path):
    save_dir = shutil.copytree(finished_run[0], tmp_path / "run")
    again = train_here(flags(tiny_dataset, save_dir, num_steps=40))
    assert "Done at step 40 of 40" in again and "step  1/" not in again
    longer = train_here(flags(tiny_dataset, save_dir, num_steps=42))
    assert "Continuing" in longer and "Done at step 42 of 42" in longer and "step 41/42" in longer


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("data.seed", 1, "data.seed: 0 until now, 1 from here on"),
        ("train.seed", 1, "train.seed: the checkpoint has 0, this run has 1"),
        ("model.n_layer", 1, "model.n_layer: the checkpoint has 2, this run has 1"),
        ("model.n_head", 4, "model.n_head: the checkpoint has 2, this run has 4"),
    ],
)
def test_another_seed_or_shape_in_the_same_save_dir_is_refused(
    finished_run, tiny_dataset, tmp_path, name, value, message
):
    save_dir = shutil.copytree(finished_run[0], tmp_path / "run")
    output = train_here(flags(tiny_dataset, save_dir, num_steps=45, **{name: value}), expect=1)
    assert message in output and "--fork" in output and "--from_pretrained" in output, output


def first_loss(output):
    return float(re.search(r"step +1/\d+ \| loss +([\d.]+)", output)[1])


def test_from_pretrained_takes_the_weights_alone(finished_run, tiny_dataset, tmp_path):
    save_dir, output = finished_run
    pretrained = f"--from_pretrained={save_dir}"
    tuned = train_here([*flags(tiny_dataset, tmp_path / "tuned", num_steps=5), pretrained])
    assert first_loss(output) > 5 and first_loss(tuned) < 2
    assert "(40 examples)" in tuned  # position and step start fresh
    output = train_here([*flags(tiny_dataset, tmp_path / "wrong", **{"model.n_embd": 16}), pretrained], expect=1)
    assert "n_embd: the checkpoint has 32, this run has 16" in output


@pytest.fixture(scope="session")
def undisturbed(tiny_dataset, tmp_path_factory):
    """(consumed batches, final arrays) of a run of 16 steps."""

    def make(directory):
        arguments = flags(tiny_dataset, directory / "run", num_steps=16, **{"train.save_interval": 0})
        train_here(arguments, consumed=directory / "consumed")

    directory = made_once(tmp_path_factory, "undisturbed", make)
    return consumed_batches(directory / "consumed"), final_state(directory / "run")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_as_if_nothing_had_been(
    undisturbed, tiny_dataset, tmp_path, number
):
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=16, **{"train.save_interval": 0})
    arguments += ["--per_device_batch_size=1"]
    process = start(arguments, consumed=tmp_path / "consumed", secs_per_step=0.2, num_devices=4)
    for line in process.stdout:
        if line.startswith("step  4/"):
            break
    process.send_signal(number)
    output = finish(process, expect=128 + number)
    stopped = int(re.search(r"Stopped and saved at step (\d+) of 16", output)[1])
    assert f"{signal.Signals(number).name}: finishing this step" in output and 4 <= stopped < 10
    assert "continue:" in output
    assert final_state(tmp_path / "run")[0] == stopped
    train_here(arguments, consumed=tmp_path / "consumed")
    consumed, arrays = undisturbed
    assert consumed_batches(tmp_path / "consumed") == consumed
    assert_bitwise_equal(final_state(tmp_path / "run")[1], arrays)


def test_the_second_signal_stops_at_once_and_a_signal_during_compilation_counts(tiny_dataset, tmp_path):
    process = start(flags(tiny_dataset, tmp_path / "run", num_steps=1000), consumed=tmp_path / "c", secs_per_step=3.0)
    for line in process.stdout:
        if line.startswith("Starting"):  # what follows is compilation
            break
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output = finish(process, expect=128 + signal.SIGTERM)
    assert "stopping at once" in output and time.monotonic() - began < 3
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_positions_and_last_good_checkpoint(
    tiny_dataset, tmp_path, monkeypatch
):
    (tmp_path / "faults.py").write_text(
        "import gin\nimport jax\nimport jax.numpy as jnp\n"
        "from gpt_pretrain.optim.adamw import adamw\nfrom gpt_pretrain.optim.optimizer import Optimizer\n\n"
        "@gin.register\ndef explode(total_steps):\n    made = adamw(total_steps, warmup_steps=1)\n"
        "    def update(grads, state, params):\n        updates, state = made.transform.update(grads, state, params)\n"
        "        big = jnp.where(state[1].count == 7, jnp.nan, 0.0)\n"
        "        return jax.tree.map(lambda leaf: leaf + big, updates), state\n"
        "    return Optimizer(made.transform._replace(update=update), made.learning_rate)\n"
    )
    (tmp_path / "x.gin").write_text("import faults\ntrain.optimizer = @explode\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [f"--gin_file={tmp_path / 'x.gin'}", *flags(tiny_dataset, tmp_path / "run")]
    output = train_here([each for each in arguments if "optimizer." not in each], expect=1)
    # The update of step 7 breaks the parameters; their norm shows it before a loss does.
    assert re.search(
        r"error: step 7: .*param_norm is nan.*position 48 .*gpt_pretrain\.inspect .*run --step 7`.*checkpoints/5\.",
        output,
    ), output
    assert final_state(tmp_path / "run")[0] == 5


@pytest.mark.slow
def test_interventions_of_the_users_own_module_are_imported_by_the_gin_file(
    tiny_dataset, tmp_path, monkeypatch, capsys
):
    (tmp_path / "my_module.py").write_text("def shift(x_BTD, ctx):\n    return x_BTD + 100.0 * (ctx.layer + 1)\n")
    (tmp_path / "x.gin").write_text(
        "model.interventions = [@intervention(), @noise/intervention()]\n"
        "intervention.kind = 'my_module:shift'\nintervention.layers = [1]\nintervention.sites = ['mlp_out']\n"
        "noise/intervention.kind = 'noise'\nnoise/intervention.sites = ['attn_out']\nnoise/intervention.strength = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    losses = []
    for gin_file in ([], [f"--gin_file={tmp_path / 'x.gin'}"]):
        save_dir = tmp_path / f"run{len(gin_file)}"
        bindings = {"optimizer.warmup_steps": 1, "train.save_interval": 0}
        output = train_here([*gin_file, *flags(tiny_dataset, save_dir, num_steps=3, **bindings)])
        losses.append(re.findall(r"loss +([\d.]+)", output))
    assert "Intervention: my_module:shift at mlp_out, layers=(1,)" in output
    assert losses[0] != losses[1]
    shift, noise = checkpoints.read_metadata(checkpoints.locate(tmp_path / "run1")).model.interventions
    assert shift.kind == "my_module:shift" and shift.function is interventions.named_in_a_file
    assert noise == interventions.Intervention("noise", sites=["attn_out"], layers=[1], strength=0.5)
    assert Provenance.read(tmp_path / "run1").interventions == (shift.described(), noise.described())
    given = [f"--checkpoint={tmp_path / 'run1'}", "--num_tokens=3"]
    assert generate.main(given) == 0
    assert (
        "note: the model was trained with interventions, and is sampled without: my_module" in capsys.readouterr().err
    )
    assert generate.main([*given, "--interventions=checkpoint"]) == 1
    assert "'my_module:shift' is a function that is named in a file" in capsys.readouterr().err
    assert generate.main([*given, '--interventions={"kind": "my_module:shift", "sites": ["mlp_out"]}']) == 0
    assert capsys.readouterr().err == "intervention: my_module:shift at mlp_out\n"


def test_generate_samples_from_a_finished_run_the_same_text_for_the_same_seed(finished_run, capsys):
    def text_of(*more, expect=0):
        assert generate.main([f"--checkpoint={finished_run[0]}", *more]) == expect
        output = capsys.readouterr()
        return output.out + output.err

    one = text_of("--prompt=the cat", "--num_tokens=20", "--seed=1")
    assert one.startswith("the cat") and len(one) > 20
    assert one == text_of("--prompt=the cat", "--num_tokens=20", "--seed=1")
    assert one != text_of("--prompt=the cat", "--num_tokens=20", "--seed=2")
    assert "error: " in text_of("--prompt=" + "x" * 50, expect=1)
    assert "error: found temperature -1.0" in text_of("--temperature=-1", expect=1)
    assert generate.main(["--checkpoint=nothing"]) == 1
    assert "no good checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_is_a_command(finished_run):
    command = [sys.executable, "-m", "gpt_pretrain.generate", f"--checkpoint={finished_run[0]}", "--num_tokens=5"]
    result = subprocess.run([*command, "--prompt=the"], env=environment(), text=True, capture_output=True, cwd=REPO)
    assert result.returncode == 0 and result.stdout.startswith("the"), result.stderr
