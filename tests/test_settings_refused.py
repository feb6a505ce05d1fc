"""Every setting refuses what it cannot be, in one line that names it, before anything happens."""

import dataclasses
import inspect

import jax
import pytest

from gpt_pretrain import checks
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.model.spec import GPTConfig
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.train.config import TrainConfig

BAD = (float("nan"), float("inf"), -float("inf"), 1e22, -3, 0.5, True, "seven", "", [], {}, object())
NOT_SETTINGS = {"describe_config", "bound_config", "parse_config", "command"}
# Values of `BAD` that are good for a setting, or mean "none of it".
GOOD = {
    "train.seed": [-3],
    "train.fork": [True],
    "train.sample_prompt": ["seven", ""],
    "train.save_dir": ["seven"],
    "train.from_pretrained": ["seven"],
    "train.wandb_project": ["seven"],
    "train.optimizer": [],
    "train.writers": [[]],
    "train.validation": [{}],
    "train.eval_tasks": [[]],
    "data.dir": ["seven"],
    "data.cache_dir": ["seven"],
    "data.seed": [-3],
    "data.exclude": ["seven", "", []],
    "data.substitute": ["seven", "", []],
    "data.mask": ["seven", "", []],
    "data.insert": [[]],
    "data.document_mask": [True],
    "data.max_epochs": [0.5],
    "data.tokenizer": ["seven"],
    "model.dropout": [0.5],
    "model.interventions": ["", []],
    "optimizer.lr": [0.5],
    "optimizer.weight_decay": [0.5],
    "optimizer.beta1": [0.5],
    "optimizer.beta2": [0.5],
    "optimizer.epsilon": [0.5],
    "optimizer.clip_norm": [0.5],
    "optimizer.final_lr_ratio": [0.5],
    "optimizer.decay_fraction": [0.5],
}


def train_config(**changes) -> TrainConfig:
    settings = {"model": GPTConfig(), "data": DataConfig(), "optimizer": adamw, "mesh": make_mesh}
    return TrainConfig(**(settings | changes))


def all_settings():
    for room, kind, make in (
        ("train", TrainConfig, train_config),
        ("data", DataConfig, DataConfig),
        ("model", GPTConfig, GPTConfig),
    ):
        for field in dataclasses.fields(kind):
            if field.name not in NOT_SETTINGS:
                yield room, field.name, make
    for name in list(inspect.signature(adamw).parameters)[1:]:
        yield "optimizer", name, lambda **changes: adamw(100, **changes)
    for name in list(inspect.signature(make_mesh).parameters)[1:]:
        yield "mesh", name, lambda **changes: make_mesh(jax.devices(), **changes)


@pytest.mark.parametrize(
    ("room", "name", "make"), all_settings(), ids=lambda each: each if isinstance(each, str) else ""
)
def test_what_a_setting_cannot_be_is_refused_in_one_line_that_names_it(room, name, make):
    good = GOOD.get(f"{room}.{name}", [])
    num_refused = 0
    for value in BAD:
        if any(value is each or (type(value) is type(each) and value == each) for each in good):
            make(**{name: value})
            continue
        with pytest.raises(ValueError, match=rf"^{room}\.{name}") as caught:
            make(**{name: value})
        assert "\n" not in str(caught.value) and "expected" in str(caught.value)
        num_refused += 1
    assert num_refused >= 8


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        ("train.save_dir", lambda path: train_config(save_dir=path)),
        ("train.from_pretrained", lambda path: train_config(from_pretrained=path)),
        ("data.dir", lambda path: DataConfig(dir=path)),
        ("data.exclude", lambda path: DataConfig(exclude=path)),
        ("data.substitute", lambda path: DataConfig(substitute=path)),
        ("data.mask", lambda path: DataConfig(mask=path)),
        ("data.insert", lambda path: DataConfig(insert=[(path, "<a:1>", [(1, 0)])])),
        ("data.mixture", lambda path: DataConfig(mixture={"web": (path, 1.0)})),
    ],
)
def test_paths_are_no_urls_and_their_tilde_is_expanded(setting, make, monkeypatch, tmp_path):
    may_be_in_a_bucket = setting not in ("data.exclude", "data.substitute", "data.mask")
    for url in (*(("s3://bucket/x", "gs://bucket/x") if not may_be_in_a_bucket else ()), "https://host/x", "file:///x"):
        with pytest.raises(ValueError, match=rf"^{setting}: {url} is a URL; expected a directory"):
            make(url)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / "a b") in repr(make("~/a b"))


def test_a_save_dir_that_is_a_file_or_below_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"^train\.save_dir: .* cannot be a directory, as .*file is a file"):
            train_config(save_dir=str(path))
    assert train_config(save_dir=tmp_path / "new" / "run").save_dir == str(tmp_path / "new" / "run")


def test_any_integer_is_a_seed():
    seeds = [0, 1, 2**32 - 1, -1, -(2**31), 2**32, 2**64, -(10**40), 10**40]
    configs = [train_config(seed=each) for each in seeds]
    assert [each.key_seed for each in configs[:3]] == seeds[:3]  # those that JAX takes stay what they are
    assert len({each.key_seed for each in configs}) == len(seeds)
    assert all(0 <= each.key_seed < 2**32 for each in configs)


def test_whole_numbers_may_be_written_with_an_exponent():
    config = train_config(num_tokens=1e10, batch_size=5e2, data=DataConfig(seq_len=1e3))
    assert (config.num_tokens, config.batch_sizes, config.data.seq_len) == (10**10, ((0, 500),), 1000)
    assert all(isinstance(each, int) for each in (config.num_tokens, config.batch_sizes[0][1], config.data.seq_len))
    assert adamw(1000, warmup_steps=1e2).learning_rate(99) == pytest.approx(6e-4)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "1", None])
def test_weights_of_a_mixture_are_numbers_above_0(weight):
    with pytest.raises(ValueError, match=r"^data\.mixture: found 'web'"):
        DataConfig(mixture={"web": ("data/web", weight), "edu": ("data/edu", 1)})
    assert checks.path("data.mixture", "data/web") == "data/web"
