"""The page of runs: what it shows of whole, killed, damaged and empty runs, and that nothing of a run becomes markup."""

import dataclasses
import html
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.inspected_run import HOSTILE, simple_plan, stream, write_run
from support.printed_commands import problem_with
from support.tags import Tags
from tensorboardX.proto.event_pb2 import Event

from data_prep.pages.plots import Line, Mark, Plot, averaged, plot_svg, reduced
from data_prep.store.files import write_json, write_note
from gpt_pretrain import inspect, report
from gpt_pretrain.data.run import open_run
from gpt_pretrain.history.report_curves import run_data
from gpt_pretrain.history.report_page import render_report
from gpt_pretrain.history.reported_run import read_run
from gpt_pretrain.history.run_events import events_of
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.settings import values_of
from gpt_pretrain.train import checkpoints, events
from gpt_pretrain.train.events import Kind
from gpt_pretrain.train.provenance import Provenance
from gpt_pretrain.train.time_file import TimeRecord
from gpt_pretrain.train.writers.tensorboard import TensorBoardWriter

SPIKE_AT = 31
CONFIG = "train.batch_size = 8\noptimizer.lr = 0.001\nmodel.n_layer = 2\n"


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory) -> Path:
    """A run of 60 steps that has made 40: killed after step 25, resumed from 20 with larger batches; nobody changes it."""
    directory = tmp_path_factory.mktemp("runs") / "a run"
    plan = simple_plan(stream(tiny_dataset))
    plan = plan.continued(dataclasses.replace(plan.stages[0], batch_sizes=((0, 12),)), 20)
    write_run(directory, {"": tiny_dataset}, plan)
    (directory / "config.gin").write_text(CONFIG)
    change = {
        "version": 1,
        "step": 20,
        "changes": {"train.batch_size": {"before": 8, "after": 12}, "optimizer.lr": {"before": 0.1, "after": 0.001}},
    }
    (directory / "changes.jsonl").write_text(json.dumps(change) + "\n" + '{"version": 1, "st')
    events.note(directory, 0, Kind.STARTED, "1 x cpu")
    log(directory, range(1, 26), purge_step=0)
    events.note(directory, 20, Kind.RESUMED, "4 x cpu")
    log(directory, range(21, 41), purge_step=21)
    secs = {"step": 30.0, "compile": 10.0, "lost_by_a_crash": 2.5}
    record = TimeRecord(open_run(directory).run_id, 2, 40, secs, {})
    write_note(directory / "time_ledger.json", record.to_json())
    return directory


def log(directory, steps, *, purge_step=None) -> None:
    writer = TensorBoardWriter(directory / "tensorboard", purge_step=purge_step)
    for step in steps:
        norm = 9.0 if step == SPIKE_AT else 1.0 + step % 3 / 10
        writer.write_scalars(
            step, {"train/loss": 11 - step / 10, "train/grad_norm": norm, "train/tokens_per_sec": 900.0}
        )
        if step % 5 == 0:
            writer.write_scalars(step, {"validation/loss": 12 - step / 10})
        if step % 10 == 0:
            sites = ("block_in", "attn_out", "new_site")
            activations = {f"activations/{n}/{site}/rms": step + n for n in range(3) for site in sites}
            norms = {f"gradients/layers/{n}": 0.5 for n in range(3)} | {"parameters/token_embedding": 7.0}
            writer.write_scalars(step, {f"statistics/{name}": value for name, value in (activations | norms).items()})
    writer.close()


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def page_of(*directories) -> str:
    runs = [read_run(str(each), values_of) for each in directories]
    return render_report(runs, python="python", made_by="python -m gpt_pretrain.report RUN --html a.html", now=2e9)


def data_in(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def shown(page: str) -> str:
    """The page's text."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def test_the_command_writes_a_page_that_needs_nothing_else(run, tmp_path, capsys):
    assert report.main([str(run), "--html", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'out.html'}: 1 run, ") and said.count("\n") == 1
    page = (tmp_path / "out.html").read_text()
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!#)", page)
    assert len(page) < 200_000


def test_the_page_says_what_ran_and_how_it_went(run):
    text = shown(page_of(run))
    for each in (
        "not finished",
        "40 of 60",
        "from step 1: batches of 8 windows of 32 tokens",
        "from step 21: batches of 12 windows of 32 tokens",
        "Loss, nats a token",
        "Norm of the gradient",
        "Where 0:42 of wall time went, in 2 sessions",
        "compile 0:10 23.5 %",
        "loss 11.5 at 5 8 at 40 8 at 40",
        "block in rms attn out rms new site rms gradient norm parameters norm",
        "layer 2 42 42 42 0.5",
    ):
        assert each in text, each


def test_the_page_says_which_interventions_ran(copy):
    assert "interventions" not in shown(page_of(copy))
    made = Provenance({}, 124, 60, "cpu", 1, 1, {"data": 1}, "3.11", {}, None, ("zero at mlp_out", "noise at block_in"))
    made.write(copy)
    assert "interventions zero at mlp_out; noise at block_in" in shown(page_of(copy))


def test_events_are_those_of_the_plan_the_sessions_the_settings_and_the_curves(run):
    found = [(each.step, each.batch, each.kind, each.words) for each in events_of(read_run(str(run), values_of))]
    assert found == [
        (0, 1, "started", "1 x cpu"),
        (20, 21, "plan", "train.batch_size: 8 until now, 12 from here on"),
        (20, 21, "settings", "optimizer.lr: 0.1 until now, 0.001 from here on"),
        (20, 21, "resumed", "4 x cpu, 5 steps after step 20 made again"),
        (SPIKE_AT, SPIKE_AT, "spike", "gradient norm 9, where 1.1 was usual"),
    ]


def test_a_run_that_noted_no_events_shows_its_sessions_by_its_curves(copy):
    (copy / "events.jsonl").unlink()
    found = [(each.step, each.kind, each.words) for each in events_of(read_run(str(copy), values_of))]
    assert (0, "started", "") in found and (20, "resumed", "5 steps after step 20 made again") in found


def test_each_event_has_a_command_that_shows_its_batch(run, capsys):
    commands = [
        html.unescape(each) for each in re.findall(r"<code>(python -m gpt_pretrain.inspect .*?)</code>", page_of(run))
    ]
    assert len(commands) == 5 and not [each for each in commands if problem_with(each)]
    assert inspect.main([*shlex.split(commands[-1])[3:], "--rows=0"]) == 0
    assert f"update {SPIKE_AT} of 60, consumed" in capsys.readouterr().out


def test_the_axes_of_tokens_and_time_are_those_of_the_plan_and_of_the_sessions(run):
    opened = read_run(str(run), values_of)
    points = run_data(opened, "run", [])
    for step in (0, 1, 19, 20, 21, 33, 60):
        assert np.interp(step, *points["tokens"]) == opened.data.plan.tokens_before(step)
    steps, secs = points["time"]
    assert steps == sorted(steps) and secs == sorted(secs) and secs[0] >= 0
    first, second = opened.curves.sessions
    paused = dataclasses.replace(second, began=second.began + 1000, ended=second.ended + 1000)
    scalars = {
        tag: dataclasses.replace(
            curve, wall_times=np.where(curve.steps > 20, curve.wall_times + 1000, curve.wall_times)
        )
        for tag, curve in opened.curves.scalars.items()
    }
    later = dataclasses.replace(opened.curves, scalars=scalars, sessions=(first, paused))
    assert np.allclose(run_data(dataclasses.replace(opened, curves=later), "run", [])["time"][1], secs, atol=0.02)


def test_several_runs_lie_behind_the_first_and_their_settings_are_compared(run, copy):
    (copy / "config.gin").write_text(CONFIG.replace("0.001", "0.002") + "model.dropout = 0.1\n")
    page = page_of(run, copy)
    text = shown(page)
    assert "a run and 1 other run" in text
    assert "Setting a run copy model.dropout not set 0.1 optimizer.lr 0.001 0.002" in text
    assert "model.n_layer 2 2" not in text
    data = data_in(page)
    assert [each["name"] for each in data["runs"]] == ["a run", "copy"]
    loss = next(each for each in data["plots"] if each["title"].startswith("Loss"))
    assert [(line["run"], line["label"]) for line in loss["lines"]] == [
        (1, ""),
        (1, "validation"),
        (0, ""),
        (0, "validation"),
    ]
    assert f"python -m gpt_pretrain.inspect {copy} --step 21" in text
    assert "All settings are the same." in shown(page_of(run, run))


def test_nothing_of_a_run_becomes_markup(run, tmp_path):
    def dressed(name: str, words: str):
        directory = shutil.copytree(run, tmp_path / name)
        writer = TensorBoardWriter(directory / "tensorboard")
        for step in (10, 20):
            writer.write_texts(step, {"samples/1": words, "samples/2": words})
            writer.write_scalars(step, {"validation/x/loss": 1.0, "evaluation/task/acc": 0.5, "other/curve": 1.0})
        writer.close()
        events.note(directory, 30, Kind.FAILED, words)
        (directory / "evaluations").mkdir()
        done = [{"version": 1, "kind": f"{words}:f"}]
        results = {"version": 1, "step": 30, "results": {words: {words: 0.5}}, "interventions": done}
        write_json(directory / "evaluations" / "30-a.json", results)
        (directory / "config.gin").write_text(f"{CONFIG}train.sample_prompt = {words!r}\n")
        (directory / "time_ledger.json").write_text(words)
        return page_of(directory)

    words = HOSTILE + "</script></blockquote><!-- \u202e\x00"
    harmless, hostile = dressed("harmless", "plain"), dressed("<b>\"'&", words)
    ours, theirs = Tags(harmless), Tags(hostile)
    assert theirs.tags == ours.tags and theirs.attributes == ours.attributes
    assert hostile.count("<script") == harmless.count("<script") == 2 and "\u202e" not in hostile
    assert "alert('é')" in shown(hostile)
    assert data_in(hostile)["runs"][0]["name"] == "<b>\"'&"


def test_samples_and_results_of_tasks_are_shown_over_the_steps(copy):
    writer = TensorBoardWriter(copy / "tensorboard")
    for step in (10, 20):
        writer.write_texts(
            step, {"samples/2": f"    second {step}", "samples/10": "tenth", "samples/1": f"first {step}"}
        )
        writer.write_scalars(step, {"evaluation/hellaswag/acc": step / 100, "validation/code/loss": 5.0})
    writer.close()
    (copy / "evaluations").mkdir()
    results = {"hellaswag": {"acc": 0.45, "alias": "hellaswag"}, "arc": {"acc": 0.5}}
    write_json(copy / "evaluations" / "40-a.json", {"version": 1, "step": 40, "tasks": ["x"], "results": results})
    done = [Intervention("zero", sites=["mlp_out"]).to_json(), Intervention("noise", strength=0.5).to_json()]
    changed = {"version": 1, "step": 40, "results": {"arc": {"acc": 0.25}}, "interventions": done}
    write_json(copy / "evaluations" / "40-c.json", changed)
    write_json(copy / "evaluations" / "40-d.json", changed | {"interventions": [{"version": 1, "kind": "melt"}]})
    write_json(copy / "evaluations" / "50-b.json", {"version": 7})
    page = page_of(copy)
    text = shown(page)
    assert "prompt 1 step 20 first 20 step 10 first 10 prompt 2 step 20 second 20 step 10 second 10 prompt 10" in text
    table = "Task Metric step 10 step 20 step 40 arc acc 0.5 "
    table += "arc, with zero at mlp_out; noise at block_in, strength=0.5 acc 0.25 hellaswag acc 0.1 0.2 0.45"
    assert table in text and "40-d.json: intervention.kind: found 'melt'" in text
    assert {"hellaswag: acc", "Validation: code/loss"} <= {each["title"] for each in data_in(page)["plots"]}
    assert "50-b.json: version 7, expected 1" in text


def test_a_run_without_curves_statistics_and_evaluations_says_so(copy):
    shutil.rmtree(copy / "tensorboard")
    text = shown(page_of(copy))
    for each in ("There are no curves", "No statistics are there", "Nothing was evaluated yet", "40 of 60"):
        assert each in text


def test_damaged_files_are_said_and_the_rest_is_shown(copy):
    for path in sorted((copy / "tensorboard").iterdir())[:1]:
        data = bytearray(path.read_bytes())
        data[data.rindex(b"train/loss") + 12] ^= 64
        path.write_bytes(data)
    (copy / "data.json").write_text("{}")
    (copy / "provenance.json").write_text("[")
    (copy / "ledger.bin").write_bytes(b"x")
    (copy / "events.jsonl").write_bytes(b"\xff\n{}\n[]\n")
    text = shown(page_of(copy))
    assert "1 record is damaged" in text and "data.json: version None" in text and "provenance.json:" in text
    assert "Loss, nats a token" in text and "gpt_pretrain.inspect" not in text


@pytest.mark.parametrize("is_there", [False, True])
def test_where_no_run_is_there_is_one_line(is_there, tmp_path, capsys):
    directory = tmp_path / "nothing"
    if is_there:
        directory.mkdir()
    assert report.main([str(directory), "--html", str(tmp_path / "out.html")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(directory) in said
    assert not (tmp_path / "out.html").exists()


def test_arguments_that_cannot_be(run, tmp_path, capsys):
    assert report.main([*[str(run)] * 9, f"--html={tmp_path / 'out.html'}"]) == 1
    assert "expected at most 8" in capsys.readouterr().err
    assert report.main([str(run), f"--html={tmp_path / 'no' / 'out.html'}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        report.main([str(run)])
    assert stop.value.code == 2


def test_a_run_of_the_trainer_is_shown(five_steps, tmp_path):
    directory = shutil.copytree(five_steps, tmp_path / "run")
    text = shown(page_of(directory))
    assert "finished" in text and "5 of 5" in text and "parameters, 2 layers" in text and "optimizer.lr = 0.01" in text
    (started,) = events.read_events(directory)
    assert started.kind is Kind.STARTED and started.step == 0 and "4 x cpu" in started.words


# --- curves that are drawn


def test_down_sampling_keeps_spikes_and_ends_and_few_points():
    x, y = np.arange(1.0, 20_001), np.zeros(20_000)
    y[[0, 7_777, 12_345, 19_999]] = 1, 50, -50, 2
    kept_x, kept_y = reduced(x, y)
    assert len(kept_x) <= 2002 and (np.diff(kept_x) > 0).all()
    assert {1.0, 7_778.0, 12_346.0, 20_000.0} <= set(kept_x.tolist())
    assert kept_y.max() == 50 and kept_y.min() == -50
    mean_x, mean_y = averaged(x, np.arange(20_000.0))
    assert len(mean_x) == 1000 and np.allclose(mean_y, mean_x - 1)
    y[5] = np.nan
    assert np.isfinite(reduced(x, y)[1]).all() and len(reduced(x[:10], y[:10])[0]) == 9


@pytest.mark.parametrize("y", [[], [np.nan], [0.0], [1e-30, 1e30], [3.0, 3.0, 3.0], [-1e-5, 1e-5], [1e300, -1e300]])
def test_any_values_can_be_drawn(y):
    line = Line(0, "", np.arange(1.0, len(y) + 1), np.array(y), has_dots=True)
    drawn = plot_svg(Plot("a", "<title>", (line,)), [Mark(0, 1.0, "spike", "<x>", "e1")], "step")
    assert "nan" not in drawn and "inf" not in drawn and "&lt;title&gt;" in drawn


# --- events.jsonl


def test_events_are_added_to_whatever_is_there(tmp_path):
    events.note(tmp_path, 1, Kind.STARTED, "two\nlines")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"version": 1, "step": 2, "ti')  # a machine lost power
    events.note(tmp_path, 3, Kind.DAMAGED, "é" * 5000)
    events.note(tmp_path, 3, Kind.DAMAGED, "é" * 5000)  # found again: the same
    events.note(tmp_path, 3, Kind.RESUMED, "")
    events.note(tmp_path, 3, Kind.RESUMED, "")
    found = events.read_events(tmp_path)
    assert [(each.step, each.kind) for each in found] == [(1, "started"), (3, "damage"), (3, "resumed"), (3, "resumed")]
    assert found[0].words == "two lines" and len(found[1].words) == 2000


def test_an_event_that_cannot_be_noted_stops_nothing(tmp_path):
    events.note(tmp_path / "nothing", 1, Kind.STARTED, "")
    os.mkfifo(tmp_path / "events.jsonl")
    events.note(tmp_path, 1, Kind.STARTED, "")
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "elsewhere")
    events.note(tmp_path, 1, Kind.STARTED, "")
    assert not (tmp_path / "elsewhere").exists()


def test_values_that_no_run_writes_are_passed_over(copy):
    (copy / "evaluations").mkdir()
    results = {"a": {"nan": float("nan"), "large": 10**400, "text": "x", "right": 0.25, "sure": True}, "b": 3}
    (copy / "evaluations" / "1-a.json").write_text(json.dumps({"version": 1, "step": 10**30, "results": results}))
    (copy / "evaluations" / "2-b.json").write_text(
        json.dumps({"version": 1, "step": 2, "results": {"a": results["a"]}})
    )
    (copy / "evaluations" / "3-c.json").write_text("[" * 100_000)
    lines = [
        {"version": 1, "step": step, "time": secs, "kind": kind, "words": "w"}
        for step, secs, kind in (
            (-1, 1.0, "failed"),
            (1, 1e15, "failed"),
            (1, -1.0, "failed"),
            (1, 1.0, "boiled"),
            (2**53, 1.0, "failed"),
            (7, 1.0, "failed"),
        )
    ]
    (copy / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    writer = TensorBoardWriter(copy / "tensorboard")
    for index, secs in enumerate((float("nan"), float("inf"), -1e300, 1e300)):
        summary = {"value": [{"tag": "train/loss", "simple_value": (float("nan"), 1e38, float("inf"), -1.0)[index]}]}
        writer._events.write_event(Event(wall_time=secs, step=(-5, 0, 2**62, 38)[index], summary=summary))
    writer.close()
    os.mkfifo(copy / "tensorboard" / "events.out.tfevents.1.h.1")
    text = shown(page_of(copy))
    for each in ("Task Metric step 2 a right 0.25 ", "/1-a.json: step is", "/3-c.json"):
        assert each in text, text
    assert [each.step for each in events.read_events(copy)] == [7]


def test_a_checkpoint_that_is_passed_over_is_an_event(five_steps, tmp_path):
    directory = shutil.copytree(five_steps, tmp_path / "run")
    shutil.copytree(directory / "checkpoints" / "5", directory / "checkpoints" / "9")
    (directory / "checkpoints" / "9" / "digests.json").write_text("{}")
    assert checkpoints.choose(directory).step == 5
    last = events.read_events(directory)[-1]
    assert (last.step, last.kind) == (9, "damage")
    assert last.words.startswith("checkpoint passed over: ") and last.words.endswith("Moved to damaged_checkpoints/9")
