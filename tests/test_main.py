"""The command line, in processes of its own, as a user types it."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from support.training_runs import assert_bitwise_equal, consumed_batches, environment, final_state, finish, flags, start

from gpt_pretrain import main

REPO = pathlib.Path(__file__).parent.parent


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
    assert main.bindings_of(args) == [
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


def test_the_documented_defaults_are_the_signatures_own():
    code = (
        "import inspect\nfrom gpt_pretrain import settings\n"
        "from gpt_pretrain.model.gpt import GPTConfig\nfrom gpt_pretrain.optim.adamw import adamw\n"
        "from gpt_pretrain.train import train\nfrom gpt_pretrain.data.config import DataConfig\n"
        "t = inspect.signature(train).parameters; o = inspect.signature(adamw).parameters; m = GPTConfig()\n"
        "print(m.n_layer, m.n_head, m.n_embd, m.vocab_size, m.dropout, t['batch_size'].default,\n"
        "      t['per_device_batch_size'].default, DataConfig().seq_len, o['lr'].default, o['weight_decay'].default)"
    )
    assert python(code).stdout.split() == "12 12 768 50304 0.0 512 16 1024 0.0006 0.1".split()


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.gin")), ids=lambda path: path.stem)
def test_every_config_parses_and_makes_a_model(path):
    code = (
        "import sys, gin\nfrom gpt_pretrain import settings\n"
        "settings.parse([sys.argv[1]], [])\nprint(gin.get_configurable('model')())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], env=environment(), text=True, capture_output=True)
    assert "GPTConfig(n_layer=" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gin_param=model.n_layers = 3"], r"doesn't have a parameter named 'n_layers'"),
        (["--gin_param=modell.n_layer = 3"], r"modell"),
        (["--gin_file=nowhere.gin"], r"nowhere\.gin"),
        (["--model.n_embd=101"], r"model\.n_embd=101 is not divisible by model\.n_head=2: 101 / 2 = 50\.50"),
        (["--data_dir=nowhere"], r"nowhere: not a prepared dataset"),
        (["--batch_size=9"], r"batch_size=9 is not a whole number of microbatches.*= 4 rows at once, 9 / 4 = 2\.25"),
        (["--num_tokens=100"], r"num_tokens=100 is less than one step: batch_size 8 x seq_len 32 = 256"),
        (["--model.vocab_size=200"], r"vocab_size=200 is smaller than the 257 ids"),
        (["--gin_param=mesh.fsdp = 3"], r"fsdp=3 does not make the 1 devices"),
        (["--gin_param=train.writers = ('consol',)"], r"train\.writers: no such writer \['consol'\]"),
        (["--gin_param=train.batch_size = '4'"], r"train\.batch_size: found '4', expected a size, or"),
        (
            ["--gin_param=train.num_checkpoints_kept = 1"],
            r"num_checkpoints_kept: found 1, expected a whole number, at least 2",
        ),
        (["--gin_param=data.max_epochs = 0.01"], r"would be met 0\.31 times in 40 steps, expected at most 0\.01"),
        (["--seq_len=0"], r"data\.seq_len: found 0"),
        (["--save_dir=gs://bucket/run"], r"train\.save_dir: gs://bucket/run is a URL"),
        (["--gin_param=train.sample_prompt = '" + "x" * 40 + "'"], r"sample_prompt has 40 tokens"),
        (["--gin_param=optimizer.warmup_steps = 99"], r"warmup_steps: found 99, expected fewer than the 40 steps"),
    ],
)
def test_mistakes_are_named_before_work_starts(tiny_dataset, tmp_path, arguments, message):
    output = finish(start([*flags(tiny_dataset, tmp_path / "run"), *arguments]), expect=1)
    assert re.search("error: .*" + message, output, re.DOTALL), output
    assert "Traceback" not in output and "step  1/" not in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_tells_its_story_and_its_curves_and_config_are_where_it_says(tiny_dataset, tmp_path):
    arguments = flags(
        tiny_dataset,
        tmp_path / "run",
        num_steps=12,
        **{
            "train.writers": ("console", "tensorboard"),
            "train.eval_interval": 5,
            "train.statistics_interval": 6,
            "train.sample_prompt": "'the cat'",
            "train.log_interval": 4,
            "model.remat": True,
            "train.num_tokens": 12.0 * 8 * 32,
        },
    )
    output = finish(start(arguments))
    for expected in (
        "Unigram entropy of the training data: 2.",
        "compute in float32, attention by xla",
        "2 microbatch(es) x 1 devices x 4",
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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    tags = set(curves.Tags()["scalars"])
    assert {
        f"train/{name}"
        for name in (
            "loss",
            "accuracy",
            "learning_rate",
            "grad_norm",
            "param_norm",
            "update_norm",
            "tokens_per_sec",
            "examples_seen",
        )
    } <= tags
    assert {"validation/loss", "statistics/activations/1/mlp_out/rms", "statistics/gradients/blocks/0"} <= tags
    assert [e.step for e in curves.Scalars("validation/loss")] == [5, 10, 12]
    assert "model.n_embd = 32" in (tmp_path / "run" / "config.gin").read_text()
    assert "tensorflow" not in output.lower()


def test_started_again_when_complete_it_says_so_and_a_longer_run_goes_on(tiny_dataset, tmp_path):
    finish(start(flags(tiny_dataset, tmp_path / "run", num_steps=6)))
    again = finish(start(flags(tiny_dataset, tmp_path / "run", num_steps=6)))
    assert "Done at step 6 of 6" in again and "step 1/" not in again
    longer = finish(start(flags(tiny_dataset, tmp_path / "run", num_steps=9)))
    assert "Continuing" in longer and "Done at step 9 of 9" in longer and "step 7/9" in longer


def test_another_seed_or_shape_in_the_same_save_dir_is_refused(tiny_dataset, tmp_path):
    finish(start(flags(tiny_dataset, tmp_path / "run", num_steps=5)))
    for name, value, message in (
        ("data.seed", 1, "data.seed: 0 until now, 1 from here on"),
        ("train.seed", 1, "train.seed: the checkpoint has 0, this run has 1"),
        ("model.n_layer", 1, "model.n_layer: the checkpoint has 2, this run has 1"),
    ):
        output = finish(start(flags(tiny_dataset, tmp_path / "run", num_steps=8, **{name: value})), expect=1)
        assert message in output and "--fork" in output, output
        assert "--from_pretrained" in output


def first_loss(output):
    return float(re.search(r"step +1/\d+ \| loss +([\d.]+)", output)[1])


def test_from_pretrained_takes_the_weights_alone(tiny_dataset, tmp_path):
    first = finish(start(flags(tiny_dataset, tmp_path / "first", num_steps=40)))
    pretrained = f"--from_pretrained={tmp_path / 'first'}"
    tuned = finish(start([*flags(tiny_dataset, tmp_path / "tuned", num_steps=5), pretrained]))
    assert first_loss(first) > 5 and first_loss(tuned) < 2
    assert "(40 examples)" in tuned  # position and step start fresh
    output = finish(start([*flags(tiny_dataset, tmp_path / "wrong", **{"model.n_embd": 16}), pretrained]), expect=1)
    assert "n_embd: the checkpoint has 32, this run has 16" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_as_if_nothing_had_been(tiny_dataset, tmp_path, number):
    plain = flags(tiny_dataset, tmp_path / "plain", num_steps=20, **{"train.save_interval": 0})
    finish(start(plain, consumed=tmp_path / "expected"))
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=20, **{"train.save_interval": 0})
    process = start(arguments, consumed=tmp_path / "consumed", secs_per_step=0.2)
    for line in process.stdout:
        if line.startswith("step  4/"):
            break
    process.send_signal(number)
    output = finish(process, expect=128 + number)
    stopped = int(re.search(r"Stopped and saved at step (\d+) of 20", output)[1])
    assert f"{signal.Signals(number).name}: finishing this step" in output and 4 <= stopped < 10
    assert "continue:" in output
    assert final_state(tmp_path / "run")[0] == stopped
    finish(start(arguments, consumed=tmp_path / "consumed"))
    assert consumed_batches(tmp_path / "consumed") == consumed_batches(tmp_path / "expected")
    assert_bitwise_equal(final_state(tmp_path / "run")[1], final_state(tmp_path / "plain")[1])


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
    tiny_dataset, tmp_path
):
    module = tmp_path / "faults.py"
    module.write_text(
        "import jax.numpy as jnp\nfrom gpt_pretrain.optim.adamw import Optimizer, adamw\nimport gin\n\n"
        "@gin.register\ndef explode(total_steps):\n    made = adamw(total_steps, warmup_steps=1)\n"
        "    def update(grads, state, params):\n        updates, state = made.transform.update(grads, state, params)\n"
        "        big = jnp.where(state[1].count == 7, jnp.nan, 0.0)\n        import jax\n"
        "        return jax.tree.map(lambda leaf: leaf + big, updates), state\n"
        "    return Optimizer(made.transform._replace(update=update), made.learning_rate)\n"
    )
    (tmp_path / "x.gin").write_text("import faults\ntrain.optimizer = @explode\n")
    arguments = [f"--gin_file={tmp_path / 'x.gin'}", *flags(tiny_dataset, tmp_path / "run")]
    arguments = [each for each in arguments if "optimizer." not in each]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_pretrain.main", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"},
    )
    output = finish(process, expect=1)
    # The update of step 7 breaks the parameters; their norm shows it before a loss does.
    assert re.search(
        r"error: step 7: .*param_norm is nan.*position 48 .*gpt_pretrain\.inspect .*run --step 7`.*checkpoints/5\.",
        output,
    ), output
    assert final_state(tmp_path / "run")[0] == 5


def test_perturbations_from_the_users_own_module_are_imported_by_the_gin_file(tiny_dataset, tmp_path):
    (tmp_path / "my_module.py").write_text("def shift(x_BTD, layer, rng):\n    return x_BTD + 100.0 * (layer + 1)\n")
    (tmp_path / "x.gin").write_text(
        "model.perturbations = [@perturb(), @noise/perturb()]\n"
        "perturb.function = 'my_module:shift'\nperturb.layers = [1]\nperturb.sites = ['mlp_out']\n"
        "noise/perturb.function = @gaussian_noise\nnoise/perturb.sites = ['attn_out']\ngaussian_noise.stddev = 0.5\n"
    )
    losses = []
    for gin_file in ([], [f"--gin_file={tmp_path / 'x.gin'}"]):
        arguments = [
            *gin_file,
            *flags(tiny_dataset, tmp_path / f"run{len(gin_file)}", num_steps=3, **{"optimizer.warmup_steps": 1}),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "gpt_pretrain.main", *arguments],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"},
        )
        output = finish(process)
        losses.append(re.findall(r"loss +([\d.]+)", output))
    assert "my_module" in output or "shift" in output
    assert losses[0] != losses[1]


def test_generate_samples_from_a_finished_run_the_same_text_for_the_same_seed(tiny_dataset, tmp_path):
    finish(start(flags(tiny_dataset, tmp_path / "run", num_steps=40)))

    def generate(*more, expect=0):
        command = [sys.executable, "-m", "gpt_pretrain.generate", f"--checkpoint={tmp_path / 'run'}", *more]
        result = subprocess.run(command, env=environment(), text=True, capture_output=True, cwd=REPO)
        assert result.returncode == expect, result.stderr
        return result.stdout + result.stderr

    one = generate("--prompt=the cat", "--num_tokens=20", "--seed=1")
    assert one.startswith("the cat") and len(one) > 20
    assert one == generate("--prompt=the cat", "--num_tokens=20", "--seed=1")
    assert one != generate("--prompt=the cat", "--num_tokens=20", "--seed=2")
    assert "error: " in generate("--prompt=" + "x" * 50, expect=1)
    command = [sys.executable, "-m", "gpt_pretrain.generate", f"--checkpoint={tmp_path / 'nothing'}"]
    result = subprocess.run(command, env=environment(), text=True, capture_output=True, cwd=REPO)
    assert result.returncode == 1 and "no good checkpoint" in result.stderr
