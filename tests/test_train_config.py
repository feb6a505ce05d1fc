"""Settings that cannot be are refused where they are said: before data is opened, before a device is touched."""

import dataclasses
import inspect

import jax
import pytest
from support.runs import build_anew, run_config

from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.model.spec import GPTConfig
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.opened_data import open_data


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"writers": ("papyrus",)}, r"train\.writers: no such writer \['papyrus'\]; known are"),
        ({"batch_size": "4"}, r"train\.batch_size: found '4', expected a size, or"),
        ({"batch_size": 0}, r"train\.batch_size: found 0"),
        ({"batch_size": 2.5}, r"train\.batch_size: found 2\.5"),
        ({"batch_size": ()}, r"train\.batch_size: found \(\)"),
        ({"batch_size": ((1, 8),)}, r"train\.batch_size: found \(\(1, 8\),\)"),
        ({"batch_size": ((0, 8), (5, 2), (4, 2))}, r"with ascending numbers of updates"),
        ({"batch_size": ((0, 8), (5, 0))}, r"train\.batch_size: found"),
        ({"batch_size": None}, r"train\.batch_size: found None"),
        ({"num_checkpoints_kept": 1}, r"train\.num_checkpoints_kept: found 1, expected a whole number, at least 2"),
        ({"num_tokens": 0}, r"train\.num_tokens: found 0, expected a whole number, at least 1"),
        ({"num_tokens": 1.5}, r"train\.num_tokens: found 1\.5, expected a whole number"),
        ({"num_tokens": float("inf")}, r"train\.num_tokens: found inf"),
        ({"num_tokens": float("nan")}, r"train\.num_tokens: found nan"),
        ({"num_tokens": "10"}, r"train\.num_tokens: found '10'"),
        ({"eval_tokens": 0}, r"train\.eval_tokens: found 0"),
        ({"sample_tokens": 0}, r"train\.sample_tokens: found 0"),
        ({"sample_prompt": ("a", 1)}, r"train\.sample_prompt: found \('a', 1\), expected a text, several, or None"),
        (
            {"sample_interval": 5},
            r"train\.sample_interval: found 5 without train\.sample_prompt; expected 0, or a text",
        ),
        ({"per_device_batch_size": 0}, r"train\.per_device_batch_size: found 0, expected a whole number, at least 1"),
        *(
            ({name: -1}, rf"train\.{name}: found -1, expected a whole number, at least 0")
            for name in (
                "log_interval",
                "eval_interval",
                "save_interval",
                "statistics_interval",
                "profile_step",
                "sample_interval",
                "verify_steps",
            )
        ),
        ({"save_dir": "http://host/run"}, r"train\.save_dir: http://host/run is a URL; expected a directory"),
        (
            {"work_dir": "w"},
            r"train\.work_dir: found w, expected None, as train\.save_dir=runs/test is on this machine",
        ),
        ({"from_pretrained": "https://b/run"}, r"train\.from_pretrained: https://b/run is a URL"),
        ({"model": {"block_size": 4}}, r"data\.seq_len=8 is longer than model\.block_size=4"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        run_config("nowhere", **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 0}, r"data\.seq_len: found 0, expected a whole number, at least 1"),
        ({"seed": 1.0}, r"data\.seed: found 1\.0"),
        ({"shuffle": "some"}, r"data\.shuffle: found 'some', expected one of"),
        ({"mixture": {}}, r"data\.mixture: found \{\}"),
        ({"dir": "https://host/data"}, r"data\.dir: https://host/data is a URL"),
    ],
)
def test_data_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_whole_numbers_may_be_written_as_floats_and_become_integers():
    config = run_config("nowhere", num_tokens=1e4, save_interval=2.0, batch_size=((0, 8.0), (3.0, 16)))
    assert (config.num_tokens, config.save_interval) == (10_000, 2)
    assert type(config.num_tokens) is int
    assert config.batch_sizes == ((0, 8), (3, 16))
    assert run_config("nowhere", batch_size=8.0).batch_sizes == ((0, 8),)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"vocab_size": 200}}, r"model\.vocab_size=200 is smaller than the 257 ids"),
        ({"num_tokens": 60}, r"num_tokens=60 is less than one step: batch_size 8 x seq_len 8 = 64"),
        ({"sample_prompt": ("x", "x" * 9)}, r"sample_prompt has 9 tokens; expected fewer than data\.seq_len=8"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_when_it_is_opened(tiny_dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(run_config(tiny_dataset, **changes))


def test_data_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="nowhere: not a prepared dataset"):
        open_data(run_config("nowhere"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 9}, r"batch_size=9 is not a whole number of microbatches.*= 4 rows at once, 9 / 4 = 2\.25"),
        ({"batch_size": 7, "mesh": (2, 2)}, r"train\.batch_size=7 cannot be split over 4 devices"),
        ({"data": {"max_epochs": 0.01}}, r"would be seen 0\.02 times in 8 steps, expected at most 0\.01"),
        ({"optimizer": lambda total: adamw(total, warmup_steps=99)}, r"warmup_steps: found 99, .* than the 8 steps"),
        ({"model": {"attention": "cudnn"}}, r"model\.attention='cudnn' cannot run: found platform 'cpu'"),
    ],
)
def test_what_does_not_fit_the_devices_or_the_length_of_the_run_is_refused_when_it_is_built(
    tiny_dataset, changes, message
):
    with pytest.raises(ValueError, match=message):
        build_anew(run_config(tiny_dataset, **changes))


@pytest.mark.parametrize("axes", [{"fsdp": 3}, {"data": 3, "fsdp": 2}, {"data": 8}])
def test_a_mesh_that_does_not_make_the_devices_is_refused(axes):
    with pytest.raises(ValueError, match="does not make the 4 devices that are there"):
        make_mesh(jax.devices(), **axes)
    with pytest.raises(ValueError, match="at most one of them -1"):
        make_mesh(jax.devices(), data=-1, fsdp=-1)
    assert make_mesh(jax.devices(), fsdp=2).shape == {"data": 2, "fsdp": 2}


def test_the_documented_defaults_are_the_signatures_own():
    train = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    rates = {name: parameter.default for name, parameter in inspect.signature(adamw).parameters.items()}
    model = GPTConfig()
    assert (model.n_layer, model.n_head, model.n_embd, model.vocab_size, model.dropout) == (12, 12, 768, 50304, 0.0)
    assert (train["batch_size"], train["per_device_batch_size"], DataConfig().seq_len) == (512, None, 1024)
    assert (train["num_tokens"], rates["lr"], rates["weight_decay"]) == (10_000_000_000, 6e-4, 0.1)
