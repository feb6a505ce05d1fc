"""How often every document was seen, and where a text is: as a search through all batches and tokens says."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.inspected_run import batches_of, prepare, simple_plan, stream, write_run

from data_prep.store.datasets import open_dataset
from data_prep.store.documents import DocumentTables
from gpt_pretrain import inspect
from gpt_pretrain.data.asked_edits import Edits, TokenSpan, inserted_document, inserted_name
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.edits import edited
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.run import RunData
from gpt_pretrain.history import text_search
from gpt_pretrain.history.occurrences import occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span

NUM_STEPS, NUM_SEEN = 130, 90


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"cats": prepare(folder / "cats"), "dogs": prepare(folder / "dogs", text="a dog barked ", name="dog")}


@pytest.fixture(scope="module")
def run(datasets, tmp_path_factory):
    """A mixture of several epochs whose batch size and sequence length change, with windows left out."""
    cats = stream(datasets["cats"], "cats", count=30, excluded=(20, 21, 22, 40))
    dogs = stream(datasets["dogs"], "dogs", count=10)
    plan = simple_plan(cats, dogs)
    plan = plan.continued(dataclasses.replace(plan.stages[0], batch_sizes=((0, 12),)), 70)
    plan = plan.continued(dataclasses.replace(plan.stages[0], seq_len=48, batch_sizes=((0, 12),)), 100)
    return write_run(tmp_path_factory.mktemp("run"), datasets, plan, num_steps=NUM_STEPS, num_consumed=NUM_SEEN)


@pytest.mark.parametrize("at", [None, 1, 71, 120, NUM_STEPS])
def test_exposures_of_every_document_equal_a_count_of_all_batches(run, datasets, at, tmp_path, capsys):
    out = tmp_path / "exposures.parquet"
    assert inspect.main([run, "--exposures", str(out)] + ([] if at is None else ["--at", str(at)])) == 0
    stop = NUM_SEEN if at is None else at
    assert f"in updates 1 to {stop}" in capsys.readouterr().out
    table = pq.read_table(out)
    assert table.schema.metadata[b"updates"] == str(stop).encode()
    plan = OpenedRun(run).plan
    rows = []  # (stream, step, window's first token, seq_len) of every row of every batch
    for batch in batches_of(datasets, plan, stop):
        stage = plan.stage_at(batch.step_index)
        for index, window in zip(batch.streams[0].tolist(), batch.windows[0].tolist(), strict=True):
            name = stage.streams[index].name
            rows.append((name, batch.step_index + 1, window * stage.seq_len, stage.seq_len))
    found = table.to_pylist()
    assert len(found) == sum(
        table.num_rows for each in datasets.values() for table in DocumentTables(each).whole_tables(["id"])
    )
    for each in found:
        begin, end = each["start"], each["start"] + each["length"]
        held = [(step, a, n) for name, step, a, n in rows if name == each["stream"] and a < end and a + n + 1 > begin]
        assert each["occurrences"] == len(held)
        targets = sum(max(0, min(end, a + n + 1) - max(begin, a + 1)) for _, a, n in held)
        assert each["target_tokens"] == targets
        steps = [step for step, _, _ in held]
        assert (each["first_step"], each["last_step"]) == ((min(steps), max(steps)) if steps else (None, None))
    assert any(each["occurrences"] == 0 for each in found) or stop > 1


def test_exposures_that_cannot_be_counted_are_refused_in_a_line(run, simple_run_without_steps, tmp_path, capsys):
    out = str(tmp_path / "x.parquet")
    for arguments, words in (
        ([run, "--exposures", out, "--at", "999"], "has the updates 1 to 130"),
        ([simple_run_without_steps, "--exposures", out], "its ledger has no update yet"),
        ([run, "--step", "3", "--at", "3"], "--at belongs to --exposures"),
        ([run, "--exposures", out, "--stream", "cats"], "--stream belongs to"),
    ):
        assert inspect.main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.parquet"))


@pytest.fixture(scope="module")
def simple_run_without_steps(datasets, tmp_path_factory):
    plan = simple_plan(stream(datasets["cats"]))
    return write_run(tmp_path_factory.mktemp("none"), {"": datasets["cats"]}, plan, num_consumed=0)


@pytest.mark.parametrize("text", ["cat sat", "ked 1", "purred ", "aa", "日本", "nowhere to be found"])
def test_a_text_is_found_wherever_a_search_of_all_tokens_finds_it(run, datasets, text, capsys, monkeypatch):
    monkeypatch.setattr(text_search, "_TOKENS_AT_ONCE", 100)  # so that places lie across two pieces
    monkeypatch.setattr(text_search, "_PIECES_AHEAD", 3)
    assert inspect.main([run, "--text", text, "--jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = []
    opened = OpenedRun(run)
    for each in opened.streams():
        tokenizer = opened.tokenizer(each)
        for split, source in open_dataset(datasets[each.name]).splits.items():
            ids = source.read(np.zeros(1, np.int64), source.num_tokens)[0].tolist()
            for spelt in (text, " " + text):
                pattern = tokenizer.encode(spelt).tolist()
                n = len(pattern)
                expected += [
                    (each.name, split, [i, i + n], spelt) for i in range(len(ids) - n + 1) if ids[i : i + n] == pattern
                ]
    assert sorted((f["stream"], f["split"], f["tokens"], f["text"]) for f in found) == sorted(expected)
    assert bool(found) == (text not in ("nowhere to be found", "aa"))
    for each in found[:: max(1, len(found) // 20)]:
        of = next(s for s in opened.streams() if s.name == each["stream"])
        tables = opened.documents(of, each["split"])
        assert tables is not None and tables.at(each["tokens"][0]).id == each["document"]
        rows = occurrences_of(opened, Span(of, each["split"], *each["tokens"], None))
        assert each["occurrences"] == [row.to_json(NUM_SEEN) for row in rows]


def test_the_places_of_a_text_are_printed_with_their_updates(run, capsys):
    assert inspect.main([run, "--text", "cat sat"]) == 0
    out = capsys.readouterr().out
    assert "of the train split" in out and "of the val split" in out and "more places: --full" in out
    assert "of batches seen" in out
    assert inspect.main([run, "--text", "cat sat", "--full"]) == 0
    full = capsys.readouterr().out
    assert "more places" not in full and "never: not trained on" in full
    assert inspect.main([run, "--text", "nowhere to be found"]) == 0
    assert "are nowhere in the streams" in capsys.readouterr().out
    assert inspect.main([run, "--text", ""]) == 1
    assert "has no token" in capsys.readouterr().err


def test_exposures_know_what_is_edited_in_place(datasets, tmp_path, capsys):
    plan = simple_plan(stream(datasets["cats"]))
    opened = {name: open_dataset(directory) for name, directory in datasets.items()}
    tables = DocumentTables(datasets["cats"])
    masked, gone = (tables.find("id", f"<doc-{number}>")[0] for number in (60, 75))
    fingerprint = opened["cats"].fingerprint
    spans = [TokenSpan(fingerprint, each.start, each.start + each.length) for each in (masked, gone)]
    places = [(3, 2), (3, 5), (9, 0), (20, 7), (21, 1), (30, 3)]
    edits = Edits(
        mask=(spans[0],), substitute=(spans[1],), insert=(inserted_document(opened["dogs"], "<dog-70>", places),)
    )
    plan = edited(plan, 2, edits, num_steps=40)
    run = str(tmp_path / "run")
    name = inserted_name(datasets["dogs"])
    directories = {"": datasets["cats"], name: datasets["dogs"], opened["dogs"].fingerprint: datasets["dogs"]}
    (tmp_path / "run").mkdir()
    RunData(run, plan, directories, 40).write()
    sources = {"": opened["cats"].splits["train"], name: opened["dogs"].splits["train"]}
    batches = [Batches(sources, plan, vocab_size=257, num_steps=40)[step] for step in range(40)]
    Ledger(each.digest for each in batches).write(run)
    assert inspect.main([run, "--exposures", str(tmp_path / "e.parquet")]) == 0
    rows = []  # (step, stream's position of each token, whether it is a target that counts)
    for batch in batches:
        stage = plan.stage_at(batch.step_index)
        of_row = {row: (each, part) for row, each, part in stage.insertions_at(batch.position + np.arange(8))}
        for row, window in enumerate(batch.windows[0].tolist()):
            positions = window * 32 + np.arange(33)
            counts = np.append(False, np.ones(32, bool) if batch.keep is None else batch.keep[0, row])
            if row in of_row:
                each, part = of_row[row]
                positions[: each.num_overwritten(part, 32)] = -1
            rows.append((batch.step_index + 1, positions, counts))
    for each in pq.read_table(tmp_path / "e.parquet").to_pylist():
        if each["stream"] != "":
            continue
        inside = [(s, (p >= each["start"]) & (p < each["start"] + each["length"]), c) for s, p, c in rows]
        steps = [step for step, held, _ in inside if held.any()]
        expected = len(steps), sum(int((held & counts).sum()) for _, held, counts in inside)
        assert (each["occurrences"], each["target_tokens"]) == expected, each
        assert (each["first_step"], each["last_step"]) == ((min(steps), max(steps)) if steps else (None, None))
    found = {each["id"]: each for each in pq.read_table(tmp_path / "e.parquet").to_pylist()}
    assert found["<doc-60>"]["occurrences"] > 0 and found["<dog-70>"]["occurrences"] == len(places)
