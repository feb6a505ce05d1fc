"""What a resumed run says of settings that are others than before."""

import dataclasses
import json
from types import SimpleNamespace

from gpt_pretrain.train.changes import FILE_NAME, announce, changes_of


def parse(text: str) -> dict:
    return json.loads(text or "{}")


def config(used: dict, bound: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        parse_config=parse, describe_config=lambda: json.dumps(used), bound_config=lambda: json.dumps(bound or {})
    )


def said(before: dict, used: dict, bound: dict | None = None) -> list[str]:
    start = SimpleNamespace(config=json.dumps(before), step=5)
    return [str(each) for each in changes_of(config(used, bound), start)]


def test_each_setting_that_differs_is_a_line():
    before = {"optimizer.lr": 0.001, "model.dropout": 0.0, "train.writers": ["console"], "train.seed": 0}
    now = {"optimizer.lr": 0.0005, "model.dropout": 0.1, "train.writers": ["console", "wandb"], "train.seed": 0}
    assert said(before, now) == [
        "model.dropout: 0.0 until now, 0.1 from here on",
        "optimizer.lr: 0.001 until now, 0.0005 from here on",
        "train.writers: ['console'] until now, ['console', 'wandb'] from here on",
    ]


def test_another_optimizer_is_named_with_its_own_settings():
    before = {"train.optimizer": "@optimizer", "optimizer.lr": 0.001}
    now = {"train.optimizer": "@lion", "lion.lr": 0.1}
    assert said(before, now) == [
        "lion.lr: not set until now, 0.1 from here on",
        "train.optimizer: @optimizer until now, @lion from here on",
    ]


def test_a_setting_that_is_set_no_longer_is_named():
    assert said({"train.a": 1, "train.b": "@x"}, {"train.b": "@x"}) == ["train.a: 1 until now, not set from here on"]


def test_what_only_the_compiled_step_uses_is_compared_with_what_the_user_set():
    before = {"train.seed": 0, "gaussian_noise.stddev": 0.1}
    assert said(before, {"train.seed": 0}) == []
    assert said(before, {"train.seed": 0}, {"gaussian_noise.stddev": 0.1, "lion.lr": 1}) == []
    assert said(before, {"train.seed": 0}, {"gaussian_noise.stddev": 0.2}) == [
        "gaussian_noise.stddev: 0.1 until now, 0.2 from here on"
    ]


def test_lists_and_tuples_are_equal_and_a_fork_is_no_change():
    before = {"train.batch_size": [[0, 8]], "train.fork": True}
    assert said(before, {"train.batch_size": [[0, 8]], "train.fork": False}) == []
    start = SimpleNamespace(config='{"a.b": [1, [2]]}', step=5)
    tuples = dataclasses.make_dataclass("Config", ["parse_config", "describe_config", "bound_config"])
    given = tuples(lambda text: {"a.b": (1, (2,))} if text == "now" else parse(text), lambda: "now", str)
    assert changes_of(given, start) == ()


def test_a_run_that_begins_and_a_record_that_cannot_be_read_change_nothing(caplog):
    assert changes_of(config({"a.b": 1}), SimpleNamespace(config="", step=0)) == ()

    def refuse(text):
        raise ValueError("a recorded configuration cannot be read: x")

    broken = SimpleNamespace(parse_config=refuse)
    assert changes_of(broken, SimpleNamespace(config="x", step=5)) == ()
    assert "Step 5: a recorded configuration cannot be read" in caplog.text


def test_changes_are_logged_and_kept_once_for_each_resumption(tmp_path, caplog):
    changes = changes_of(config({"a.b": 2, "a.c": "new"}), SimpleNamespace(config='{"a.b": 1}', step=5))
    for _ in range(2):  # killed, and resumed from the same checkpoint
        announce(changes, 5, str(tmp_path))
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"torn')
    announce(changes, 9, str(tmp_path))
    announce((), 12, str(tmp_path))
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    differences = {"a.b": {"before": 1, "after": 2}, "a.c": {"after": "new"}}
    assert json.loads(lines[0]) == {"version": 1, "step": 5, "changes": differences}
    assert lines[1] == '{"torn' and json.loads(lines[2])["step"] == 9 and len(lines) == 3
    assert "Settings that change after step 5:" in caplog.text and "a.b: 1 until now, 2 from here on" in caplog.text
