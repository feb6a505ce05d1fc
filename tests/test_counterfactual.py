"""The same run without a document, or with one: what is shared is shared bit by bit, and nothing else differs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.inspected_run import prepare
from support.training_runs import (
    SEQ_LEN,
    assert_bitwise_equal,
    environment,
    final_state,
    finish,
    flags,
    start_two,
    train_here,
)

from data_prep.store import buckets
from gpt_pretrain import inspect, replay
from gpt_pretrain.counterfactual import __main__ as counterfactual
from gpt_pretrain.counterfactual.probes import probe_steps
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.token_losses import losses_of

NUM_STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> str:
    """Twelve steps with a checkpoint every four; its data is found from anywhere."""
    save_dir = str(tmp_path_factory.mktemp("original") / "run")
    changes = {"train.save_interval": 4, "train.num_checkpoints_kept": 5}
    train_here(flags(data, save_dir, num_steps=NUM_STEPS, **changes))
    return save_dir


@pytest.fixture(scope="module")
def seen_after(run):
    """step -> the id of a document that is first seen after it, with all its steps."""
    opened = OpenedRun(run)
    (stream,) = opened.streams()
    tables = opened.documents(stream)
    found = []
    for number in range(0, 100):
        for document in tables.find("id", f"<doc-{number}>"):
            out = inspect_steps(run, document.id)
            found.append((document.id, out))

    def choose(step: int) -> tuple[str, list[int]]:
        return next((name, steps) for name, steps in found if steps and steps[0] > step)

    return choose


def inspect_steps(run: str, document: str) -> list[int]:
    """Every step that holds the document, by the command that users have for that."""
    opened = OpenedRun(run)
    from gpt_pretrain.history.occurrences import occurrences_of
    from gpt_pretrain.history.spans import find_spans

    (span,) = find_spans(opened, document=document)
    return sorted({each.place.step_index + 1 for each in occurrences_of(opened, span)})


def answered(capsys, *arguments, status=0) -> str:
    found = counterfactual.main([str(each) for each in arguments])
    output = capsys.readouterr()
    assert found == status, output.out[-3000:] + output.err[-3000:]
    return output.out + output.err


def differing(run: str, arm) -> list[int]:
    ours, theirs = Ledger.read(arm).digests, Ledger.read(run).digests
    both = min(len(ours), len(theirs))
    return (np.flatnonzero(ours[:both] != theirs[:both]) + 1).tolist()


def test_without_a_document_only_its_batches_differ_and_the_control_is_the_run_bit_by_bit(
    run, seen_after, tmp_path, capsys
):
    document, steps = seen_after(5)
    out = tmp_path / "answer"
    printed = answered(capsys, run, "--without", document, "--save_dir", out, "--control", "--num_probes", 3)
    assert (
        f"the first step that differs is {steps[0]}: control arm and edited arm from the checkpoint of step 4"
        in printed
    )
    assert re.search(r"control: all 12 batches are those of .*; parameters bitwise equal at steps 8, 12\.", printed)
    assert "at exactly the occurrences: step" in printed
    assert differing(run, out / "control") == [] and differing(run, out / "edited") == steps
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == steps and result["begin"] == 4
    losses = {arm: {each["step"]: each["loss"] for each in result["losses"][arm]} for arm in ("control", "edited")}
    assert set(losses["edited"]) == set(losses["control"]) >= {steps[0] - 1, steps[0], NUM_STEPS}
    for group in ("documents", "neighbours", "validation"):
        assert losses["edited"][steps[0] - 1][group] == losses["control"][steps[0] - 1][group]
        assert losses["edited"][NUM_STEPS][group] != losses["control"][NUM_STEPS][group]
    distance = {each["step"]: each for each in result["distance"]}
    assert distance[NUM_STEPS]["parameters"]["all"] > 0 and not distance[NUM_STEPS]["bitwise_equal"]
    assert len(distance[NUM_STEPS]["activations"]["cosine"]) > 0
    (gradients,) = result["gradients"]
    assert gradients["step"] == steps[0] and -1 <= gradients["cosine"]["all"] < 0.999999
    assert result["samples"]["edited"][0]["prompt"] == result["samples"]["control"][0]["prompt"]
    page = (out / "index.html").read_text()
    assert page.count("<svg") > 3 and "src=" not in page
    # An arm is a run like any other.
    assert replay.main([str(out / "edited"), "--verify"]) == 0
    assert inspect.main([str(out / "edited"), "--document", document]) == 0
    capsys.readouterr()
    refused = answered(capsys, run, "--without", seen_after(8)[0], "--save_dir", out, status=1)
    assert "holds the answer to another question (without differ" in refused


@pytest.mark.slow
def test_the_end_of_the_run_stands_for_the_control_where_it_has_a_checkpoint_there(run, seen_after, tmp_path, capsys):
    document, steps = seen_after(8)
    out = tmp_path / "answer"
    printed = answered(capsys, run, "--without", document, "--mask", "--save_dir", out, "--num_probes", 2)
    assert "control arm" not in printed and not (out / "control").exists()
    assert set(differing(run, out / "edited")) <= set(steps) and differing(run, out / "edited")
    result = json.loads((out / "result.json").read_text())
    assert [each["step"] for each in result["losses"]["control"]] == [12]
    assert result["baseline"] == run and result["asked"]["is_masked"]


@pytest.mark.slow
def test_an_arm_that_is_killed_continues_and_what_is_done_is_not_trained_again(run, seen_after, tmp_path, capsys):
    document, _ = seen_after(5)
    arguments = [run, "--without", document, "--num_probes", 3, "--save_dir"]
    answered(capsys, *arguments, tmp_path / "whole")
    out = tmp_path / "killed"
    answered(capsys, *arguments, out)
    for name in ("checkpoints/12", "samples.json"):  # as after a kill in step 9
        path = out / "edited" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    answered(capsys, *arguments, out)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    for name in ("losses", "distance", "gradients", "samples", "checked", "lines"):
        assert results[0][name] == results[1][name], name
    assert_bitwise_equal(*(final_state(tmp_path / name / "edited")[1] for name in ("whole", "killed")))


@pytest.mark.slow
def test_two_processes_answer_too_and_their_control_is_the_run_bit_by_bit(data, seen_after, tmp_path):
    changes = {"train.save_interval": 4, "train.num_checkpoints_kept": 5, "mesh.fsdp": 2}
    run, out = tmp_path / "run", tmp_path / "answer"
    for process in start_two(flags(data, run, num_steps=NUM_STEPS, **changes), tmp_path):
        finish(process)
    document, steps = seen_after(5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    asked = [str(run), "--without", document, "--control", "--save_dir", str(out), "--num_probes", "2"]
    together = [f"--coordinator_address={address}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gpt_pretrain.counterfactual", *asked, *together, f"--process_id={number}"],
            env=environment(2),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]
    first, second = (finish(process) for process in processes)
    assert "parameters bitwise equal at steps 8, 12." in first and "control:" not in second
    assert "at exactly the occurrences: step" in first
    assert differing(str(run), out / "control") == [] and differing(str(run), out / "edited") == steps


@pytest.mark.slow
def test_a_run_without_checkpoints_is_trained_again_from_its_beginning(run, seen_after, tmp_path, capsys):
    original = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(original / "checkpoints")
    document, steps = seen_after(2)
    out = tmp_path / "answer"
    printed = answered(
        capsys, original, "--without", document, "--save_dir", out, "--until", steps[0] + 1, "--num_probes", 1
    )
    assert "control arm and edited arm from the beginning" in printed
    assert differing(run, out / "control") == []
    assert differing(run, out / "edited") == [step for step in steps if step <= steps[0] + 1]
    assert len(Ledger.read(out / "edited")) == steps[0] + 1


@pytest.mark.slow
def test_an_inserted_document_is_in_its_rows_and_nowhere_else(run, tmp_path_factory, tmp_path, capsys):
    dogs = prepare(tmp_path_factory.mktemp("dogs"), text="a dog ", name="dog", num_documents=130)
    out = tmp_path / "answer"
    places = "6:1,6:3,10:0"
    inserted = ["--insert", dogs, "<dog-120>", places]
    printed = answered(capsys, run, *inserted, "--save_dir", out, "--num_probes", 2)
    assert "at exactly the inserted ones: steps 6, 10" in printed
    assert differing(run, out / "edited") == [6, 10]
    result = json.loads((out / "result.json").read_text())
    assert "documents" in result["losses"]["edited"][0]["loss"] and result["num_rows"] == 3


@pytest.mark.slow
def test_a_control_that_is_not_the_run_is_said_and_fails(run, seen_after, tmp_path, capsys):
    document, _ = seen_after(5)
    other = ["--control", "--gin_param", "optimizer.lr = 0.02", "--num_probes", 1]
    printed = answered(capsys, run, "--without", document, "--save_dir", tmp_path / "out", *other, status=1)
    assert "all 12 batches are those of" in printed and "parameters NOT equal at steps 8, 12" in printed
    assert "at exactly the occurrences" in printed  # of the edited arm, which is what it should be


def test_an_answer_never_goes_into_the_run_itself(run, capsys):
    before = sorted(os.listdir(run))
    assert "is the run itself" in answered(capsys, run, "--without", "<doc-5>", "--save_dir", run, status=1)
    assert sorted(os.listdir(run)) == before


@pytest.mark.slow
def test_an_answer_may_lie_in_a_bucket(run, seen_after, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    document, steps = seen_after(5)
    out = f"{bucket}/answer"
    printed = answered(capsys, run, "--without", document, "--save_dir", out, "--num_probes", 1)
    assert "at exactly the occurrences: step" in printed
    result = json.loads(buckets.read(f"{out}/result.json"))
    assert result["checked"]["edited"]["differing_steps"] == steps
    assert [each["step"] for each in result["losses"]["edited"]][-1] == NUM_STEPS and result["distance"]
    assert b"<svg" in buckets.read(f"{out}/index.html")
    assert replay.main([f"{out}/edited", "--verify"]) == 0


@pytest.mark.slow
def test_an_intervention_changes_no_batch_and_the_parameters_from_its_first_step_on(run, tmp_path, capsys):
    out = tmp_path / "answer"
    asked = '{"kind": "zero", "sites": ["mlp_out"], "layers": [1], "first_step": 7}'
    printed = answered(capsys, run, "--intervene", asked, "--save_dir", out, "--control", "--num_probes", 2)
    assert "No batch differs, the first step that differs is 7" in printed
    assert differing(run, out / "edited") == []
    result = json.loads((out / "result.json").read_text())
    losses = {arm: {each["step"]: each["loss"] for each in result["losses"][arm]} for arm in ("control", "edited")}
    assert losses["edited"][6]["validation"] == pytest.approx(losses["control"][6]["validation"], abs=1e-5)
    assert losses["edited"][7]["validation"] != losses["control"][7]["validation"]
    assert "zero at mlp_out, layers=(1,), first_step=7" in (out / "index.html").read_text()
    assert "asked0/intervention.kind = 'zero'" in (out / "edited" / "config.gin").read_text()


@pytest.mark.slow
def test_many_arms_give_the_losses_that_each_gives_alone(run, seen_after, tmp_path, capsys):
    (first, _), (second, _) = seen_after(4), seen_after(8)
    lines = tmp_path / "each.txt"
    lines.write_text(f"{second}\n\n{first} {second}\n")
    out = tmp_path / "many"
    printed = answered(capsys, run, "--each", lines, "--save_dir", out)
    assert "2 arms, 0 of them done" in printed and "effects.parquet" in printed
    table = pq.read_table(out / "effects.parquet").to_pylist()
    members = pq.read_table(out / "members.parquet").to_pylist()
    assert [(each["arm"], each["document"]) for each in members] == [(0, second), (1, first), (1, second)]
    assert {(each["arm"], each["document"]) for each in table if each["is_without"]} == {
        (0, second),
        (1, first),
        (1, second),
    }
    single = tmp_path / "single"
    answered(capsys, run, "--without", second, "--save_dir", single, "--num_probes", 1)
    opened = OpenedRun(run)
    (stream,) = opened.streams()
    (document,) = opened.documents(stream).find("id", second)
    count = min(document.length, SEQ_LEN + 1)
    tokens = opened.dataset(stream).splits["train"].read(np.array([document.start]), count)
    end = opened.tokenizer(stream).end_of_text
    by_arm = {each["arm"]: each for each in table if each["document"] == second}
    for directory, value in ((single / "edited", by_arm[0]["loss"]), (run, by_arm[0]["control_loss"])):
        alone = losses_of(f"{directory}/checkpoints/{NUM_STEPS}", tokens, end_of_text=end)
        np.testing.assert_allclose(value, alone.nll.mean(), rtol=1e-5)
    assert by_arm[0]["effect"] == pytest.approx(by_arm[0]["loss"] - by_arm[0]["control_loss"], abs=1e-6)
    assert by_arm[0]["loss"] != by_arm[1]["loss"]
    os.remove(out / "arms" / "1.json")
    assert "2 arms, 1 of them done" in answered(capsys, run, "--each", lines, "--save_dir", out)
    assert pq.read_table(out / "effects.parquet").to_pylist() == table


@pytest.mark.slow
def test_random_sets_leave_out_a_fraction_of_the_documents_seen(run, tmp_path, capsys):
    arguments = ["--subsets", 2, "--fraction", 0.05, "--seed", 3, "--targets", 4, "--mask", "--until", 6]
    answered(capsys, run, *arguments, "--save_dir", tmp_path / "a")
    members = pq.read_table(tmp_path / "a" / "members.parquet").to_pylist()
    sizes = [sum(each["arm"] == arm for each in members) for arm in (0, 1)]
    assert sizes[0] == sizes[1] > 1
    sets = [{each["document"] for each in members if each["arm"] == arm} for arm in (0, 1)]
    assert sets[0] != sets[1]
    assert pq.read_table(tmp_path / "a" / "effects.parquet").num_rows % 2 == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing is asked"),
        (["--without", "nobody"], "no document has the id nobody"),
        (["--without", "<doc-5>", "--until", "99"], "has the steps 1 to 12"),
        (["--without", "<doc-5>", "--each", "x"], "and neither --without"),
        (["--each", "missing.txt"], "no such file"),
        (["--subsets", "2"], "expected N >= 1 and 0 < P < 1"),
        (["--insert", "data", "<x>", "3-4"], "expected steps and rows, as 12:0,40:3"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(run, arguments, words, tmp_path, capsys):
    refused = answered(capsys, run, *arguments, "--save_dir", tmp_path / "out", status=1)
    assert words in refused and refused.count("\n") == 1
    assert not (tmp_path / "out" / "edited").exists()


def test_losses_are_measured_around_the_first_step_that_differs():
    steps = probe_steps(300, 900, 412, 4)
    assert {411, 412, 900} <= steps and min(steps) > 300
    assert probe_steps(0, 1, 1, 20) == {1}
