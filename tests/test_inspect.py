"""Which documents a batch holds, and which batches hold a document."""

import dataclasses
import html
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.inspected_run import HOSTILE, batches_of, prepare, simple_plan, stream, write_run

from data_prep.store import manifest as manifest_lib
from data_prep.store.documents import DocumentTables
from gpt_pretrain import inspect
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.run import RunData
from gpt_pretrain.history.occurrences import occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.page_rows import link
from gpt_pretrain.history.rows import read_rows
from gpt_pretrain.history.spans import Span, find_spans
from gpt_pretrain.history.token_text import pieces
from gpt_pretrain.model.interventions import Intervention

EXCLUDED = (20, 21, 22, 40)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"cats": prepare(folder / "cats"), "dogs": prepare(folder / "dogs", text="a dog barked ", name="dog")}


@pytest.fixture(scope="module")
def run(datasets, tmp_path_factory):
    """A mixture of several epochs that changes its batch size, sequence length and exclusions under way."""
    cats, dogs = (
        stream(datasets["cats"], "cats", count=30, excluded=EXCLUDED),
        stream(datasets["dogs"], "dogs", count=10),
    )
    plan = simple_plan(cats, dogs)
    first = plan.stages[0]
    plan = plan.continued(dataclasses.replace(first, batch_sizes=((0, 12),)), 70)
    cats = dataclasses.replace(cats, excluded=())
    plan = plan.continued(dataclasses.replace(first, seq_len=48, streams=(cats, dogs), batch_sizes=((0, 12),)), 100)
    return write_run(tmp_path_factory.mktemp("run"), datasets, plan, num_steps=130, num_consumed=90)


@pytest.fixture(scope="module")
def simple_run(datasets, tmp_path_factory):
    plan = simple_plan(stream(datasets["cats"]))
    return write_run(tmp_path_factory.mktemp("simple"), {"": datasets["cats"]}, plan)


def test_occurrences_of_every_document_equal_a_search_through_all_batches(run, datasets):
    opened = OpenedRun(run)
    expected_of: dict = {}
    for each in batches_of(datasets, opened.plan, 130):
        stage = opened.plan.stage_at(each.step_index)
        for row, (index, window) in enumerate(zip(each.streams[0].tolist(), each.windows[0].tolist(), strict=True)):
            first = window * stage.seq_len
            expected_of.setdefault(stage.streams[index].name, []).append(
                (each.step_index, row, first, first + stage.seq_len + 1)
            )
    num_last_targets = 0
    for name, directory in datasets.items():
        for shard in manifest_lib.load(directory).shards_of("train", "documents"):
            for document in pq.read_table(f"{directory}/{shard.name}").to_pylist():
                start, stop = document["start"], document["start"] + document["length"]
                expected = [
                    (step, row, (max(start, a) - a, min(stop, b) - a), max(start, a) == b - 1)
                    for step, row, a, b in expected_of[name]
                    if max(start, a) < min(stop, b)
                ]
                (span,) = find_spans(opened, document=document["id"], stream=name)
                found = occurrences_of(opened, span)
                assert [(o.place.step_index, o.place.row, o.window_span, o.only_target) for o in found] == expected
                num_last_targets += sum(o.only_target for o in found)
    assert num_last_targets > 10


def test_document_output_counts_updates_from_one_and_tells_seen_from_planned(run, capsys):
    assert inspect.main([run, "--document", "<doc-60>", "--jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    batch = OpenedRun(run).plan.batch(lines[0]["update"] - 1)
    assert batch.windows[lines[0]["row"]] == lines[0]["window"] and batch.streams[lines[0]["row"]] == 0
    assert {line["seen"] for line in lines} == {True, False}
    assert all(line["seen"] == (line["update"] <= 90) for line in lines)
    assert {line["epoch"] for line in lines} >= {0, 1}
    for update in (90, 91):  # the last that the ledger has, and the first that it has not
        batch, stage = OpenedRun(run).plan.batch(update - 1), OpenedRun(run).plan.stage_at(update - 1)
        name = stage.streams[int(batch.streams[0])].name
        assert inspect.main([run, "--token", str(batch.windows[0] * 32), "--stream", name, "--jsonl"]) == 0
        seen = {line["update"]: line["seen"] for line in map(json.loads, capsys.readouterr().out.splitlines())}
        assert seen[update] == (update == 90)
    num_seen = sum(line["seen"] for line in lines)
    assert inspect.main([run, "--document", "<doc-60>"]) == 0
    out = capsys.readouterr().out
    assert f"{num_seen} occurrences seen (update" in out and f"{len(lines) - num_seen} planned" in out


def test_a_document_that_is_in_no_update_is_explained(run, datasets, simple_run, capsys, tmp_path):
    tables = DocumentTables(datasets["cats"])
    assert inspect.main([run, "--token", str(20 * 32 + 5), "--stream", "cats"]) == 0
    assert "windows are excluded: 20" in capsys.readouterr().out
    last = tables.at(tables.num_tokens - 1)
    num_targets = tables.num_tokens - 1
    seq_len = next(n for n in range(2, num_targets) if num_targets // n * n < last.start)
    plan = simple_plan(stream(datasets["cats"]), seq_len=seq_len)
    there = write_run(tmp_path / "tail", {"": datasets["cats"]}, plan, num_steps=2, num_consumed=1)
    assert inspect.main([there, "--document", str(last.id)]) == 0
    out = capsys.readouterr().out
    assert "All of it lies in the stream's tail" in out and "In none of the 2 updates" in out
    val = DocumentTables(datasets["cats"], "val").at(0)
    assert inspect.main([simple_run, "--url", str(val.url)]) == 0
    out = capsys.readouterr().out
    assert "It is in the val split: never trained on" in out and "occurrence" not in out


def test_a_ten_billion_token_run_answers_in_milliseconds(datasets, tmp_path):
    num_tokens = 10_000_000_000
    big = dataclasses.replace(stream(datasets["cats"]), num_tokens=num_tokens, excluded=tuple(range(100, 200_000, 40)))
    plan = simple_plan(big, seq_len=1024, batch_sizes=((0, 512),))
    RunData(str(tmp_path), plan, {"": datasets["cats"]}, 3 * num_tokens // (512 * 1024)).write()
    Ledger().write(tmp_path)
    opened = OpenedRun(str(tmp_path))
    opened.plan  # noqa: B018 - reading the plan is the run's opening, not the question
    start = time.perf_counter()
    (span,) = find_spans(opened, document="<doc-60>")
    found = occurrences_of(opened, span)
    assert time.perf_counter() - start < 0.05
    assert len(found) >= 2 and {each.place.epoch for each in found} >= {0, 1}
    for each in found:
        assert plan.batch(each.place.step_index).windows[each.place.row] == each.place.window


def test_rows_of_a_batch_are_its_windows_and_their_documents_texts(datasets, run, tmp_path):
    source = [json.loads(line) for line in Path(datasets["cats"], "../text.jsonl").read_text().splitlines()]
    texts = {document["id"]: document["text"] for document in source}
    cats = stream(datasets["cats"])
    plan = simple_plan(cats, seq_len=2000, batch_sizes=((0, 4),))
    opened = OpenedRun(write_run(tmp_path / "long", {"": datasets["cats"]}, plan, num_steps=4, num_consumed=2))
    num_whole = 0
    for step in range(3):
        for row, window in zip(read_rows(opened, step), plan.batch(step).windows.tolist(), strict=True):
            assert (row.window, row.start, row.position) == (window, window * 2000, 4 * step + row.row)
            assert [piece.start for piece in row.slices] == [0, *(piece.stop for piece in row.slices[:-1])]
            assert row.slices[-1].stop == 2001
            for piece in row.slices:
                document = piece.document
                assert document is not None
                if row.is_whole(piece):
                    assert piece.text == texts[document.id]
                    num_whole += 1
                else:
                    assert piece.text.strip("\N{REPLACEMENT CHARACTER}") in texts[document.id]
    assert num_whole > 50
    # In a mixture each row is read from its own stream.
    mixed = OpenedRun(run)
    names = [row.stream for row in read_rows(mixed, 80)]
    assert names == [("cats", "dogs")[i] for i in mixed.plan.batch(80).streams] and len(set(names)) == 2
    assert all(
        row.slices[0].document.id.startswith({"cats": "<doc", "dogs": "<dog"}[row.stream])
        for row in read_rows(mixed, 80)
    )


def test_step_speaks_the_users_numbering_and_rows_are_chosen(simple_run, capsys):
    assert inspect.main([simple_run, "--step", "2", "--rows", "3:5", "--jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    batch = OpenedRun(simple_run).plan.batch(1)
    assert [line["window"] for line in lines] == batch.windows[3:5].tolist()
    assert [(line["update"], line["row"], line["position"]) for line in lines] == [(2, 3, 11), (2, 4, 12)]
    for arguments in (["--step", "0"], ["--step", "61"], ["--step", "1", "--rows", "5:99"]):
        assert inspect.main([simple_run, *arguments]) == 1
        assert arguments[-1] in capsys.readouterr().err


def test_page_is_self_contained_escapes_hostile_text_and_has_every_row(datasets, tmp_path):
    plan = simple_plan(stream(datasets["cats"]), seq_len=900, batch_sizes=((0, 6),))
    there = write_run(tmp_path / "run", {"": datasets["cats"]}, plan, num_steps=2, num_consumed=1)
    page = tmp_path / "page.html"
    assert inspect.main([there, "--step", "1", "--html", str(page)]) == 0
    text = page.read_text()
    assert html.escape(HOSTILE) in text and "<img" not in text and text.count("<script>") == 1
    assert not re.search(r"<[^>]* (src|srcset|data|action|on\w+)=|@import|url\(|<link|<base|<iframe", text)
    assert re.search(r"default-src 'none'.*script-src 'sha256-[\w+/=]+'", text) and "script-src 'unsafe" not in text
    rows = read_rows(OpenedRun(there), 0)
    for row in rows:
        assert f'id="r{row.row}"' in text and f'href="#r{row.row}"' in text
        for number, piece in enumerate(row.slices):
            assert f'id="r{row.row}d{number}"' in text and f'href="#r{row.row}d{number}"' in text
            assert html.escape(piece.document.url) in text
    for tag in re.findall('<a href="http[^>]*>', text):
        assert 'rel="noopener' in tag
    quoted = re.findall(r"<blockquote[^>]*>(.*?)</blockquote>", text, re.S)
    assert [html.unescape(re.sub("<[^>]*>", "", each)).removeprefix("<|endoftext|>") for each in quoted] == [
        piece.text for row in rows for piece in row.slices
    ]


def test_an_address_that_is_no_web_page_is_no_link():
    assert link("javascript:alert(1)") == "javascript:alert(1)" and "href" in link("https://example.org")
    assert "<b>" not in link("https://example.org/<b>") and '" onclick' not in link('https://a.org/" onclick="x')


def test_tokens_that_are_parts_of_a_character_are_shown_as_one(simple_run):
    tokenizer = OpenedRun(simple_run).tokenizer(OpenedRun(simple_run).streams()[0])
    ids = tokenizer.encode("a日b😀").astype(np.uint16)
    assert [piece.text for piece in pieces(tokenizer, ids)] == ["a", "日", "b", "😀"]
    cut = pieces(tokenizer, ids[2:-1])  # the rest of a character, and one without its end
    assert [piece.text for piece in cut] == ["\N{REPLACEMENT CHARACTER}"] * 2 + ["b"] + [
        "\N{REPLACEMENT CHARACTER}"
    ] * 3
    assert [(piece.start, piece.stop) for piece in cut] == [(i, i + 1) for i in range(6)]


def save_checkpoint(directory, spec):
    """Random weights, as a run would save them; the parameters."""
    import jax
    from support.runs import make_metadata

    from gpt_pretrain.model.gpt import init_params
    from gpt_pretrain.train.checkpoints import Checkpoints

    params = jax.tree.map(lambda leaf: leaf * 5, init_params(spec, jax.random.key(0)))  # far from even probabilities
    kept = Checkpoints(directory)
    kept.save({"params": params}, make_metadata(3, spec=spec, seq_len=spec.num_positions))
    kept.wait()
    kept.close()
    return params


@pytest.mark.parametrize(("num_chunks", "document_mask"), [(1, False), (4, True)])
def test_losses_are_those_of_the_evaluation_step_and_colour_the_page(
    simple_run, tmp_path, capsys, monkeypatch, num_chunks, document_mask
):
    import jax
    import jax.numpy as jnp
    from support.models import make_spec

    from gpt_pretrain.history import token_losses
    from gpt_pretrain.model.document_mask import documents_of
    from gpt_pretrain.model.gpt import model_of
    from gpt_pretrain.train.step import StepOptions, make_eval_step

    monkeypatch.setattr(token_losses, "num_loss_chunks", lambda *_: num_chunks)
    monkeypatch.setattr(token_losses, "_TOKENS_AT_ONCE", 3 * 32)  # the last rows are not a whole batch
    spec = make_spec(32, document_mask=document_mask)
    trained_with = (Intervention("add", vector=[9.0] * 32), Intervention("zero", sites=["mlp_out"]))
    params = save_checkpoint(tmp_path / "run", dataclasses.replace(spec, interventions=trained_with))
    arguments = [simple_run, "--step", "4", "--checkpoint", str(tmp_path / "run")]
    assert inspect.main([*arguments, "--jsonl", "--html", str(tmp_path / "page.html")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = read_rows(OpenedRun(simple_run), 3)
    tokens = np.stack([row.tokens for row in rows])
    evaluate = jax.jit(make_eval_step(StepOptions(spec)))
    for index, line in enumerate(lines):
        weights = jnp.zeros((1, 8)).at[0, index].set(1.0)
        nll, _ = evaluate(params, jnp.asarray(tokens)[None], weights, 0)
        assert line["mean_loss"] == pytest.approx(float(nll) / 32, rel=1e-4)
        assert len(line["losses"]) == 32 and np.mean(line["losses"]) == pytest.approx(line["mean_loss"])
    page = (tmp_path / "page.html").read_text()
    assert "Its training had interventions: add at block_in, vector of 32 numbers; zero at mlp_out." in page
    # Losses belong to the token that was predicted: the second token of a row has the first loss.
    assert f"id {tokens[0][0]}: only an input" in page
    assert f"id {tokens[0][1]}: {lines[0]['losses'][0]:.3f} nats" in page
    assert all(f"{line['mean_loss']:.3f} nats" in page for line in lines)
    model = model_of(spec)(params)
    inputs_BT = jnp.asarray(tokens[:, :-1], jnp.int32)
    x_BTD = model(inputs_BT, documents=documents_of(inputs_BT, 256) if document_mask else None)
    logits_BTV = np.asarray(model.logits(x_BTD))[..., :257]
    order_BTV = np.argsort(-logits_BTV, axis=-1)
    rank_BT = 1 + (order_BTV == tokens[:, 1:, None]).argmax(-1)
    assert np.array_equal(token_losses.losses_of(str(tmp_path / "run"), tokens, end_of_text=256).rank, rank_BT)
    assert f"id {tokens[7][-1]}: {lines[7]['losses'][-1]:.3f} nats" in page and f", rank {rank_BT[7][-1]}" in page


def test_losses_by_a_checkpoint_of_another_vocabulary_or_length_are_refused(simple_run, datasets, tmp_path, capsys):
    from support.models import make_spec

    save_checkpoint(tmp_path / "run", make_spec(16))
    assert inspect.main([simple_run, "--step", "1", "--checkpoint", str(tmp_path / "run")]) == 1
    assert "has 16 positions, the windows have 32 inputs" in capsys.readouterr().err
    assert inspect.main([simple_run, "--step", "1", "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert "no good checkpoint" in capsys.readouterr().err


def test_shards_without_a_manifest_have_rows_but_no_documents(datasets, tmp_path, capsys):
    there = tmp_path / "bare"
    there.mkdir()
    for shard in manifest_lib.load(datasets["cats"]).shards_of("train", "bin"):
        shutil.copy(f"{datasets['cats']}/{shard.name}", there)
    plan: Plan = simple_plan(stream(str(there)))
    bare = write_run(tmp_path / "run", {"": str(there)}, plan)
    assert inspect.main([bare, "--step", "1"]) == 0 and "no table of documents" in capsys.readouterr().out
    assert inspect.main([bare, "--token", "100"]) == 0 and "In 1 window (3): " in capsys.readouterr().out
    assert inspect.main([bare, "--document", "x"]) == 1 and "no table of documents" in capsys.readouterr().err


def test_a_stream_that_was_renamed_or_replaced_is_followed_by_its_data(datasets, tmp_path, capsys):
    a, b = (stream(directory) for directory in datasets.values())
    directories = list(datasets.values())
    first = simple_plan(a)
    web, code = dataclasses.replace(a, name="web", count=3), dataclasses.replace(b, name="code")
    renamed = first.continued(dataclasses.replace(first.stages[0], streams=(web, code)), 5)
    forked = first.continued(dataclasses.replace(first.stages[0], streams=(b,)), 5, fork=True)
    names = {"": directories[0], "web": directories[0], "code": directories[1]}
    known = {"": directories[1], a.fingerprint: directories[0], b.fingerprint: directories[1]}
    window = int(first.batch(2).windows[0])
    for plan, places in ((renamed, names), (forked, known)):
        save_dir = tmp_path / f"run{len(plan.stages[-1].streams)}"
        save_dir.mkdir()
        RunData(str(save_dir), plan, places, 20).write()
        run = OpenedRun(str(save_dir))
        (span,) = [
            Span(each, "train", window * 32 + 9, window * 32 + 10, None)
            for each in run.streams()
            if each.fingerprint == a.fingerprint
        ][-1:]
        assert (2, 0) in [(each.place.step_index, each.place.row) for each in occurrences_of(run, span)]
        assert run.dataset(span.stream).fingerprint == a.fingerprint
        assert inspect.main([str(save_dir), "--step", "3", "--rows", "0"]) == 0
        assert f"window {window} " in capsys.readouterr().out
