"""Texts by the model during training: when, from which weights, at what cost, and again after a crash."""

import contextlib
import textwrap

import jax
import numpy as np
import pytest
from jax import monitoring
from support.runs import build_anew, run_config
from support.training_runs import finish, flags, start_two
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.pages.text import printable
from data_prep.store.tokenizers import ByteTokenizer
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.train import train as train_lib
from gpt_pretrain.train.actions.action import Now
from gpt_pretrain.train.actions.evaluation import Evaluate
from gpt_pretrain.train.actions.samples import WriteSamples
from gpt_pretrain.train.feed import feed
from gpt_pretrain.train.loop import Loop
from gpt_pretrain.train.pretrained import load
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.time_ledger import TimeLedger
from gpt_pretrain.train.writers.base import RunWriter

SETTINGS = {"sample_prompt": ("the", ""), "sample_tokens": 5, "statistics_interval": 0}


class TextWriter(RunWriter):
    """Keeps texts."""

    def __init__(self):
        self.written = []

    def write_texts(self, step, texts):
        self.written.append((step, dict(texts)))

    write_scalars = write_images = write_histograms = write_hparams = flush = close = lambda self, *args, **kwargs: None


@contextlib.contextmanager
def compilations():
    """A list that gets a name for each function that JAX compiles in the block."""
    found = []

    def note(event, duration_secs, **kwargs):
        if event.startswith("/jax/core/compile/backend_compile"):
            found.append(event)

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(note)


def test_samples_come_at_the_interval_and_at_the_end(tiny_dataset):
    built, start = build_anew(run_config(tiny_dataset, num_steps=6, sample_interval=3, **SETTINGS))
    writer = TextWriter()
    with StopSignal() as stop:
        actions = [WriteSamples(built, writer)]
        Loop(built, start, built.fresh_state(), actions, TimeLedger()).run(feed(built, start), stop)
    assert [step for step, _ in writer.written] == [3, 6]  # the last step's once
    assert all(texts.keys() == {"samples/1", "samples/2"} for _, texts in writer.written)
    assert all(texts["samples/1"].startswith("the") and texts["samples/2"] for _, texts in writer.written)
    assert writer.written[0][1] != writer.written[-1][1]


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4)], ids=["one-device", "split-parameters"])
def test_samples_depend_on_the_weights_alone_and_the_sampler_is_compiled_once(tiny_dataset, mesh):
    built, _ = build_anew(run_config(tiny_dataset, mesh=mesh, per_device_batch_size=2, sample_interval=1, **SETTINGS))
    writer, state = TextWriter(), built.fresh_state()
    action = WriteSamples(built, writer)
    action.run(Now(1, state, False))
    with compilations() as compiled:
        action.run(Now(2, state, False))
        other = state._replace(params=jax.tree.map(lambda leaf: leaf * 3, state.params))
        compiled.clear()  # of the multiplication
        action.run(Now(3, other, False))
    assert not compiled
    first, second, third = (texts for _, texts in writer.written)
    assert first == second != third
    tokenizer, params = built.data.tokenizer, jax.device_put(state.params, jax.devices()[0])
    prompt = [tokenizer.end_of_text, *b"the"]
    new = sample(params, built.spec, np.array(prompt), seq_len=8, num_tokens=5, seed=0, stop=256)
    assert first["samples/1"] == printable("the" + tokenizer.decode(new))


def test_a_sample_that_fails_is_logged_once_and_training_goes_on(tiny_dataset, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory for it")

    monkeypatch.setattr("gpt_pretrain.train.actions.samples.sample", fail)
    built, start = build_anew(run_config(tiny_dataset, num_steps=4, sample_interval=1, **SETTINGS))
    with StopSignal() as stop:
        loop = Loop(built, start, built.fresh_state(), [WriteSamples(built, TextWriter())], TimeLedger())
        loop.run(feed(built, start), stop)
    assert loop.is_complete
    (record,) = [each for each in caplog.records if "No samples after step 1" in each.message]
    assert "no memory for it" in str(record.exc_info)


def samples_of(save_dir) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(save_dir / "tensorboard")).Reload()
    return {
        name: [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{name}/text_summary")
        ]
        for name in ("samples/1", "samples/2")
    }


@pytest.mark.slow
def test_a_run_that_crashed_after_a_checkpoint_has_the_samples_of_an_uninterrupted_one(
    tiny_dataset, tmp_path, monkeypatch
):
    def config(name):
        changes = {"num_steps": 8, "sample_interval": 3, "save_interval": 3, "eval_interval": 6}
        return run_config(tiny_dataset, tmp_path / name, writers=("tensorboard",), **changes, **SETTINGS)

    assert train_lib.train(config("quiet")) == 0
    with monkeypatch.context() as patch:  # at step 6, after the checkpoint and before anything that comes later
        patch.setattr(Evaluate, "run", lambda self, now: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_lib.train(config("crashed"))
    assert (tmp_path / "crashed" / "checkpoints" / "6").exists()
    assert train_lib.train(config("crashed")) == 0
    found = samples_of(tmp_path / "crashed")
    assert found == samples_of(tmp_path / "quiet")
    assert [step for step, _ in found["samples/1"]] == [3, 6, 8]
    assert all(text.startswith("    the") for _, text in found["samples/1"])


@pytest.mark.slow
def test_two_processes_with_split_parameters_write_the_samples_of_the_whole_model_once(tiny_dataset, tmp_path):
    changes = {
        "mesh.fsdp": 4,
        "train.per_device_batch_size": 1,
        "train.sample_prompt": ("the", "a"),
        "train.sample_interval": 2,
        "train.sample_tokens": 8,
        "train.writers": ("console", "tensorboard", "wandb"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        outputs = [
            finish(each) for each in start_two(flags(tiny_dataset, tmp_path / "run", num_steps=5, **changes), tmp_path)
        ]
    assert outputs[0].count("--- a sample") == 6 and "a sample" not in outputs[1]
    found = samples_of(tmp_path / "run")
    assert [step for step, _ in found["samples/2"]] == [2, 4, 5]
    assert len(list(tmp_path.glob("run/wandb/offline-run-*"))) == 1  # the first process alone writes
    params, metadata = load(tmp_path / "run")
    tokenizer = ByteTokenizer()
    for index, prompt in enumerate(changes["train.sample_prompt"]):
        ids = np.array([tokenizer.end_of_text, *prompt.encode()])
        new = sample(params, metadata.model, ids, seq_len=32, num_tokens=8, seed=index, stop=tokenizer.end_of_text)
        text = textwrap.indent(printable(prompt + tokenizer.decode(new)), "    ")
        assert found[f"samples/{index + 1}"][-1] == (5, text)
