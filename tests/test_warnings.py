"""What is allowed and seldom meant is a line at the start of a run."""

from types import SimpleNamespace

import pytest

from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.train import report


def warnings(caplog, *, epochs: dict[str, float], sizes: dict[str, int], data: DataConfig | None = None) -> list[str]:
    splits = {name: SimpleNamespace(num_tokens=size) for name, size in sizes.items()}
    datasets = {name: SimpleNamespace(directory=f"data/{name}", splits=splits) for name in epochs}
    config = SimpleNamespace(data=data or DataConfig())
    built = SimpleNamespace(data=SimpleNamespace(datasets=datasets), config=config, total_steps=90)
    caplog.clear()
    report._warn_of_data(built, SimpleNamespace(plan=SimpleNamespace(epochs=lambda steps: epochs)))
    return [record.getMessage() for record in caplog.records]


def test_many_epochs_are_a_line_for_each_stream_that_is_seen_often(caplog):
    sizes = {"train": 1000, "val": 100}
    assert warnings(caplog, epochs={"web": 0.5, "edu": 3.9}, sizes=sizes) == []
    (line,) = warnings(caplog, epochs={"web": 0.5, "edu": 37.2}, sizes=sizes)
    assert line.startswith("data/edu: will be seen 37 times in this run's 90 steps")


@pytest.mark.parametrize(
    "data", [DataConfig(max_epochs=40), DataConfig(mixture={"edu": ("data/edu", 1, 40), "web": ("data/web", 1)})]
)
def test_who_said_how_often_is_not_warned(caplog, data):
    assert warnings(caplog, epochs={"edu": 37.2}, sizes={"train": 1000}, data=data) == []


def test_a_validation_split_larger_than_the_training_split_is_a_line(caplog):
    (line,) = warnings(caplog, epochs={"web": 1.0}, sizes={"train": 1000, "val": 1001})
    assert line == "data/web: the validation split, 1,001 tokens, is larger than the training split, 1,000 tokens."
    assert warnings(caplog, epochs={"web": 1.0}, sizes={"train": 1000, "val": 1000}) == []
