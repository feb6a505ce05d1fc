"""What a model is asked beside its loss: log-likelihoods, continuations, HellaSwag's files; and the harness's absence."""

import dataclasses
import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import END_OF_TEXT, make_spec, make_test_mesh
from support.weights import params_of, save_checkpoint

from data_prep.store.tokenizers import ByteTokenizer, user_tokenizer
from gpt_pretrain import evaluate
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import logical_axes, model_of
from gpt_pretrain.model.intervening import Rows, doses_at, make_hook
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.parallel.partition import param_shardings
from gpt_pretrain.tasks import suite as suite_lib
from gpt_pretrain.tasks.choices import Question, ask, read_questions
from gpt_pretrain.tasks.generation import Generator
from gpt_pretrain.tasks.packing import Request, Row, batches_of, rows_of
from gpt_pretrain.tasks.scoring import Score, Scorer
from gpt_pretrain.tasks.suite import Suite
from gpt_pretrain.tasks.task_model import TaskModel

NUM_POSITIONS = 32
SPECS = {mask: make_spec(NUM_POSITIONS, document_mask=mask, n_layer=1) for mask in (False, True)}


def some_requests(seed=0, num_contexts=8) -> list[Request]:
    """Continuations of contexts, several of each; some too long together, some with end-of-text inside."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num_contexts):
        context = rng.integers(0, 256, rng.integers(1, NUM_POSITIONS + 8)).tolist()
        if number % 2:
            context[len(context) // 2] = END_OF_TEXT
        for _ in range(rng.integers(1, 5)):
            found.append(Request(context, rng.integers(0, 256, rng.integers(1, 14)).tolist()))
    return found


@functools.cache
def logp_of(spec):
    """(params, window (1, NUM_POSITIONS), doses of its interventions) -> log-probabilities (NUM_POSITIONS, ids)"""

    @jax.jit
    def logp(params, inputs_BT, *doses):
        model = model_of(spec)(params)
        documents = documents_of(inputs_BT, END_OF_TEXT) if spec.document_mask else None
        positions_BT = documents.positions_BT if documents else None
        rows = Rows(inputs_BT, jnp.arange(1), 0, 0, positions_BT) if doses else None
        hook = make_hook(spec.interventions, spec.n_layer, spec.n_head, doses[0] if doses else None, rows)
        x_BTD = model(inputs_BT, documents=documents, hook=hook)
        return jax.nn.log_softmax(model.logits(x_BTD)[0, :, : spec.vocab_size])

    return lambda *args: np.asarray(logp(*args))


def direct(spec, params, request: Request, *doses) -> tuple[float, bool]:
    """One sequence alone, as the model was trained on it; what is right of it, the model does not see."""
    tokens = np.array([*request.context, *request.continuation])[-(NUM_POSITIONS + 1) :]
    window = np.zeros((1, NUM_POSITIONS), np.int32)
    window[0, : len(tokens) - 1] = tokens[:-1]
    targets_N = np.array(request.continuation)
    logp_NV = logp_of(spec)(params, window, *doses)[len(tokens) - 1 - len(targets_N) : len(tokens) - 1]
    return float(logp_NV[np.arange(len(targets_N)), targets_N].sum()), bool((logp_NV.argmax(-1) == targets_N).all())


@pytest.mark.parametrize("mask", SPECS)
def test_log_likelihoods_are_those_of_each_sequence_alone(mask):
    spec, requests = SPECS[mask], some_requests()
    params = params_of(spec)
    window = np.array([[1, 2, 3, *[0] * (NUM_POSITIONS - 3)]])
    requests += [Request([1, 2, 3], [int(logp_of(spec)(params, window)[2].argmax())]), Request([7], [])]
    expected = [direct(spec, params, request) for request in requests[:-1]]
    for sizes in [(1, 1)] if mask else [(1, 1), (2, 2)]:
        mesh = make_test_mesh(*sizes)
        split = jax.device_put(params, param_shardings(params, mesh, logical_axes))
        found = Scorer(spec, mesh, tokens_at_once=64)(split, requests)
        assert found.pop() == Score(0.0, True, 0)
        np.testing.assert_allclose([score.loglikelihood for score in found], [each[0] for each in expected], atol=5e-5)
        assert [score.is_greedy for score in found] == [each[1] for each in expected]
        assert [score.num_tokens for score in found] == [len(request.continuation) for request in requests[:-1]]
        assert found[-1].is_greedy


def test_the_continuations_of_a_context_share_it_and_shapes_are_few():
    rng = np.random.default_rng(0)
    requests = [
        Request(context, rng.integers(0, 256, rng.integers(1, 30)).tolist())
        for context in (rng.integers(0, 256, rng.integers(1, 100)).tolist() for _ in range(200))
        for _ in range(4)
    ]
    rows = rows_of(requests, 128)
    assert sorted(number for row in rows for number in row.requests) == list(range(800)) and len(rows) < 300
    assert all(row.num_tokens <= 128 for row in rows)
    batches = list(batches_of(rows, max_length=128, tokens_at_once=1024, multiple_of=2))
    assert [row for batch, _ in batches for row in batch] == rows
    shapes = {shape for _, shape in batches}
    assert len(shapes) <= 16 and all(rows % 2 == 0 and rows * tokens <= 1024 for rows, tokens, _ in shapes)
    num_padded = sum(rows * tokens for _, (rows, tokens, _) in batches)
    alone = sum(len(request.context) + len(request.continuation) - 1 for request in requests)
    assert num_padded < 0.7 * alone  # padding included


@pytest.mark.parametrize(
    "request_, problem",
    [
        (Request([], [1]), "a continuation of 1 tokens after a context of 0"),
        (Request([1], [1] * 33), "a continuation of 33 tokens after a context of 1: expected at most 32"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_, problem):
    with pytest.raises(ValueError, match=problem):
        rows_of([request_], 32)


def test_what_is_too_long_loses_tokens_on_the_left():
    (row,) = rows_of([Request(range(10), [90, 91, 92])], 8)
    assert row == Row(context=(4, 5, 6, 7, 8, 9), continuations=[(90, 91, 92)], requests=[0])


@pytest.mark.parametrize("mask", SPECS)
def test_many_prompts_are_continued_as_each_alone(mask):
    spec = SPECS[mask]
    params, rng = params_of(spec), np.random.default_rng(1)
    prompts = [rng.integers(0, 256, size).tolist() for size in (1, 21, 5, 9, 3)]
    prompts[3][4] = END_OF_TEXT
    alone = [
        sample(params, spec, np.array(p), seq_len=NUM_POSITIONS, num_tokens=10, temperature=0.0, stop=END_OF_TEXT)
        for p in prompts
    ]
    mesh = make_test_mesh(2, 1)
    on_mesh = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    generate = Generator(spec, mesh, tokens_at_once=64)
    assert generate(on_mesh, prompts, num_tokens=10) == [ids.tolist() for ids in alone]
    ended = generate(on_mesh, prompts, num_tokens=10, has_ended=lambda ids: True)
    assert [len(ids) for ids in ended] == [8] * 5  # asked after 8 tokens
    cut = generate(on_mesh, [list(range(40))], num_tokens=10)
    assert cut == generate(on_mesh, [list(range(40))[-22:]], num_tokens=10)
    with pytest.raises(ValueError, match="found 32 new tokens for a model of 32 positions"):
        generate(on_mesh, prompts, num_tokens=32)


# Interventions

RAMP = [channel / 16 - 1 for channel in range(32)]  # that LayerNorm does not take away
EXACT = (
    Intervention("add", vector=RAMP, sites=["stream_out"], positions=(3, 16)),
    Intervention("add", vector=RAMP[::-1], sites=["mlp_out"], token_ids=[*range(0, 257, 2)]),
    Intervention("zero", strength=4.0, sites=["attn_heads"], heads=[1], schedule=[(1, 0.0), (5, 0.25)], ramp=True),
)
DRAWN = (
    Intervention("noise", strength=0.3, sites=["embeddings"]),
    Intervention("dropout", strength=0.3, sites=["mlp_out"], rows=0.5),
)


def mixed(x_BTD, ctx):
    """Of the user's, and no business of one token alone."""
    return x_BTD + 0.1 * jnp.cumsum(x_BTD, axis=1)


@pytest.mark.parametrize("mask, given", [(False, EXACT), (True, EXACT), (False, (Intervention(mixed),))])
def test_log_likelihoods_under_interventions_are_those_of_each_sequence_alone(mask, given):
    spec, requests, mesh = SPECS[mask], some_requests(1), make_test_mesh(1, 1)
    params, changed = params_of(spec), dataclasses.replace(spec, interventions=given)
    score = Scorer(spec, mesh, tokens_at_once=64, interventions=given)
    plain = [direct(spec, params, request)[0] for request in requests]
    for step in (1, 3):
        expected = [direct(changed, params, request, *doses_at(step, given))[0] for request in requests]
        assert (np.abs(np.subtract(expected, plain)) > 1e-2).mean() > 0.8
        found = [each.loglikelihood for each in score(params, requests, step=step)]
        np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.slow
def test_random_interventions_are_the_same_for_a_text_whatever_else_is_asked():
    spec, requests = SPECS[False], some_requests(2)
    params = params_of(spec)

    def scores(requests, sizes=(1, 1), seed=7, **how):
        mesh = make_test_mesh(*sizes)
        on_mesh = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        score = Scorer(spec, mesh, interventions=DRAWN, seed=seed, **how)
        return np.array([each.loglikelihood for each in score(on_mesh, requests)])

    found = scores(requests, tokens_at_once=64)
    plain = [each.loglikelihood for each in Scorer(spec, make_test_mesh(1, 1))(params, requests)]
    assert (np.abs(found - plain) > 1e-2).all() and (np.abs(found - scores(requests, seed=8)) > 1e-2).all()
    np.testing.assert_allclose(scores(requests, (2, 2)), found, atol=5e-5)
    first = [number for number, each in enumerate(requests) if each.context == requests[0].context]
    np.testing.assert_allclose(scores([requests[number] for number in first]), found[first], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask", SPECS)
def test_prompts_are_continued_under_interventions_as_each_alone(mask):
    spec, rng = SPECS[mask], np.random.default_rng(1)
    params, prompts = params_of(spec), [rng.integers(0, 256, size).tolist() for size in (1, 17, 4)]
    prompts[1][4] = END_OF_TEXT
    alone, plain = (
        [
            sample(params, spec, np.array(p), seq_len=NUM_POSITIONS, num_tokens=10, temperature=0.0,
                   stop=END_OF_TEXT, interventions=given, step=3).tolist()
            for p in prompts
        ]
        for given in (EXACT, ())
    )  # fmt: skip
    generate = Generator(spec, make_test_mesh(1, 1), tokens_at_once=64, interventions=EXACT)
    assert generate(params, prompts, num_tokens=10, step=3) == alone != plain


@pytest.mark.parametrize(
    "wrong, problem",
    [
        (Intervention("mean"), "texts are no batch to take a mean of; expected a vector"),
        (Intervention("zero", rows=[0, 1]), "texts are no rows of a batch, which have numbers; expected a fraction"),
        (Intervention("zero", on_gradients=True), "no gradients are computed here"),
        (Intervention("zero", layers=[1]), r"no layer \[1\]"),
    ],
)
def test_interventions_that_only_training_can_do_are_refused(wrong, problem):
    with pytest.raises(ValueError, match=problem):
        TaskModel(SPECS[False], make_test_mesh(1, 1), ByteTokenizer(), interventions=[wrong])


# HellaSwag

LINES = [
    {"ctx": "the cat sat", "endings": ["on a mat", "off", "in", "x y"], "label": 0},
    {"ctx": "a dog", "endings": ["ran", "ran off", "é漢", "sat"], "label": "3"},
]


def write_lines(path, lines=LINES):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def llmc_content(tokenizer) -> bytes:
    """As llm.c's `write_evalfile` lays it out, written down from its description once more."""
    stream, longest = [], 0
    for index, line in enumerate(LINES):
        lists = [tokenizer.encode(text).tolist() for text in (line["ctx"], *(" " + end for end in line["endings"]))]
        body = [number for ids in lists for number in (len(ids), *ids)]
        example = [65535, 2 * (5 + len(body)), index, int(line["label"]), 4, *body]
        stream += example
        longest = max(longest, 2 * len(example))
    return struct.pack("<256i", 20240522, 1, len(LINES), longest, *[0] * 252) + struct.pack(f"<{len(stream)}H", *stream)


def test_both_files_of_hellaswag_hold_the_same_questions(tmp_path):
    gpt2 = user_tokenizer("gpt2")
    (tmp_path / "hellaswag_val.bin").write_bytes(llmc_content(gpt2))
    questions = read_questions(tmp_path / "hellaswag_val.bin", gpt2)
    assert questions == read_questions(write_lines(tmp_path / "hellaswag_val.jsonl"), gpt2)
    assert [question.label for question in questions] == [0, 3]
    assert [gpt2.decode(each) for each in questions[1].completions] == [" ran", " ran off", " é漢", " sat"]
    with pytest.raises(ValueError, match=r"holds ids of GPT-2's tokenizer, the model's is 'byte'"):
        read_questions(tmp_path / "hellaswag_val.bin", ByteTokenizer())


def test_a_damaged_file_of_llmc_is_refused_wherever_the_damage_is(tmp_path):
    gpt2, path = user_tokenizer("gpt2"), tmp_path / "hellaswag_val.bin"
    content = llmc_content(gpt2)
    whole = read_questions_of(path, content, gpt2)
    for end in (0, 3, 1024, len(content) - 2, len(content) - 1):
        with pytest.raises(ValueError, match=r"hellaswag_val.bin: .* expected "):
            read_questions_of(path, content[:end], gpt2)
    with pytest.raises(ValueError, match="what follows 2 examples is 2 bytes, expected nothing"):
        read_questions_of(path, content + b"\0\0", gpt2)
    for place in [0, 4, 8, 12, *range(1024, 1024 + 12)]:  # header and head of an example
        changed = bytearray(content)
        changed[place] ^= 0x55
        try:
            assert read_questions_of(path, bytes(changed), gpt2) != whole  # another id or label: no digest knows
        except ValueError as error:
            assert "expected" in str(error) and "\n" not in str(error)
    refused = bytearray(content)
    refused[1024 + 2] += 2  # bytes of the first example
    with pytest.raises(ValueError, match=r"example 0 of 2, at byte 1024, its length is 42 bytes, expected 40"):
        read_questions_of(path, bytes(refused), gpt2)


def read_questions_of(path, content: bytes, tokenizer) -> list[Question]:
    path.write_bytes(content)
    return read_questions(path, tokenizer)


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"ctx": "a"}', "line 1: found no field 'endings'"),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', "found label 1 of 1 endings"),
        ('{"ctx": "a", "endings": ["b"], "label": ""}', "line 1: found invalid literal"),
        ('{"ctx": "a", "endings": [3], "label": 0}', "ctx and endings are texts"),
        ("[1]", "line 1: found list indices"),
        ("\n\nno json", "line 3: found Expecting value"),
        ("\n", "holds no questions"),
    ],
)
def test_lines_that_are_no_questions_are_refused(tmp_path, text, problem):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_questions(tmp_path / "a.jsonl", ByteTokenizer())
    with pytest.raises(ValueError, match=r"none.jsonl: cannot be read \(No such file"):
        read_questions(tmp_path / "none.jsonl", ByteTokenizer())


def test_acc_is_by_the_sum_and_acc_norm_by_the_mean_of_the_tokens():
    class Fixed:
        def context(self, ids):
            return [END_OF_TEXT, *ids]

        def scores(self, requests):
            assert all(request.context[0] == END_OF_TEXT for request in requests)
            return [Score(sum(request.continuation), True, len(request.continuation)) for request in requests]

    sums_and_means = [[-4], [-3, -3], [-6, -6, -6]]  # the first has the best sum, the second the best mean
    found = ask(Fixed(), [Question([1], sums_and_means, 0), Question([2], sums_and_means, 1)])  # pyright: ignore
    assert found == {"acc": 0.5, "acc_stderr": 0.5, "acc_norm": 0.5, "acc_norm_stderr": 0.5, "num_questions": 2}
    assert ask(Fixed(), [Question([1], sums_and_means, 1)]) == {"acc": 0.0, "acc_norm": 1.0, "num_questions": 1}  # pyright: ignore


@pytest.mark.parametrize("mask, asked, first", [(True, None, True), (False, None, False), (False, True, True)])
def test_contexts_begin_as_documents_did_where_the_mask_was_on_or_one_asks_for_it(mask, asked, first):
    model = TaskModel(SPECS[mask], make_test_mesh(1, 1), ByteTokenizer(), end_of_text_first=asked)
    assert model.context([1, 2]) == ([END_OF_TEXT] if first else []) + [1, 2]
    assert model.context([END_OF_TEXT, 2]) == [END_OF_TEXT, 2] and model.context([]) == [END_OF_TEXT]


# The command


def test_evaluate_prints_and_keeps_what_a_checkpoint_answers(tmp_path, capsys):
    spec = SPECS[False]
    params, path = params_of(spec), write_lines(tmp_path / "hs.jsonl")
    run = save_checkpoint(tmp_path / "run", spec, params)
    assert evaluate.main([str(run), f"--tasks={path}", f"--output={tmp_path / 'out.json'}"]) == 0
    expected = []
    for question in read_questions(path, ByteTokenizer()):
        found = np.array([direct(spec, params, Request(question.context, each))[0] for each in question.completions])
        expected.append([found.argmax() == question.label,
                         (found / [len(each) for each in question.completions]).argmax() == question.label])  # fmt: skip
    acc, acc_norm = np.mean(expected, axis=0)
    output = capsys.readouterr().out
    assert f"{run}/checkpoints/3: step 3\n" in output and f"hs    acc            {acc:.4f}" in output
    (kept,) = (run / "evaluations").iterdir()
    content = json.loads(kept.read_text())
    assert (content["version"], content["step"], content["tasks"]) == (1, 3, [str(path)])
    assert content["results"]["hs"]["acc"] == acc and content["results"]["hs"]["acc_norm"] == acc_norm
    assert kept.name.startswith("3-") and str(kept) in output
    assert json.loads((tmp_path / "out.json").read_text())["results"]["hs"]["acc,none"] == acc
    # All checkpoints, good ones and then one that is damaged.
    save_checkpoint(run, spec, params, step=4)
    every = [str(run), f"--tasks={path}", "--every", "--limit=1"]
    assert evaluate.main(every) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if ": step " in line] == [
        f"{run}/checkpoints/{step}: step {step}" for step in (3, 4)
    ]
    (run / "checkpoints" / "3" / "run" / "metadata").write_text("{}")
    assert evaluate.main(every) == 1
    captured = capsys.readouterr()
    assert f"{run}/checkpoints/4: step 4" in captured.out and f"{run}/checkpoints/3: step" not in captured.out
    assert "checkpoints/3: run/metadata has digest" in captured.err and "Passed over." in captured.err


def test_evaluate_asks_with_interventions_as_strong_as_at_the_checkpoints_step(tmp_path, capsys):
    own = Intervention("add", vector=[3.0] + 31 * [0.0], sites=["mlp_out"], first_step=4)  # nothing yet at step 3
    spec = dataclasses.replace(SPECS[False], interventions=(own, Intervention("noise", in_evaluation=False)))
    params, path = params_of(spec), write_lines(tmp_path / "hs.jsonl")
    run = save_checkpoint(tmp_path / "run", spec, params)
    save_checkpoint(run, spec, params, step=4)
    seen = []

    def asked(*more):
        """[(step, interventions in the file, its scores)], and what was said."""
        before = {*(run / "evaluations").glob("*")}
        with pytest.MonkeyPatch.context() as patch:
            scores = TaskModel.scores
            patch.setattr(TaskModel, "scores", lambda *a: seen.append(scores(*a)) or seen[-1])
            assert evaluate.main([str(run), f"--tasks={path}", "--every", *more]) == 0
        new = sorted({*(run / "evaluations").glob("*")} - before)
        kept = [json.loads(each.read_text()) for each in new]
        return [
            (each["step"], [*map(Intervention.from_json, each["interventions"])]) for each in kept
        ], capsys.readouterr().err

    note = "note: the model was trained with interventions, and is asked without: add at mlp_out"
    found, said = asked()
    assert found == [(3, []), (4, [])] and said.startswith(note) and said.count("\n") == 1
    found, said = asked("--interventions=checkpoint", f"--output={tmp_path / 'out.json'}")
    assert found == [(3, [own]), (4, [own])]  # beside the files of the plain model
    assert said == "intervention: add at mlp_out, first_step=4, vector of 32 numbers\n"
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert json.loads((tmp_path / "out-4.json").read_text())["interventions"][0]["first_step"] == 4
    (tmp_path / "zero.json").write_text('{"kind": "zero", "sites": ["mlp_out"]}')
    assert asked(f"--interventions={tmp_path / 'zero.json'}")[0] == [
        (step, [Intervention("zero", sites=["mlp_out"])]) for step in (3, 4)
    ]
    assert asked('--interventions={"kind": "zero", "sites": ["mlp_out"]}')[0] == []  # the same question


@pytest.mark.parametrize(
    "tasks, more, problem",
    [
        ("nowhere.jsonl", [], "nowhere.jsonl: cannot be read"),
        (",", [], "--tasks: found ',', expected names of tasks"),
        ("a/x.bin,b/x.jsonl", [], "two tasks are called 'x'"),
        ("nowhere.jsonl", ['--interventions={"kind": "mean"}'], "texts are no batch to take a mean of"),
        ("nowhere.jsonl", ["--interventions={"], "--interventions: no JSON"),
        ("nowhere.jsonl", ["--limit=0"], "--limit: found 0, expected a whole number, at least 1"),
    ],
)
def test_evaluate_refuses_in_a_line(tasks, more, problem, tmp_path, capsys):
    run = save_checkpoint(tmp_path / "run", SPECS[False], params_of(SPECS[False]))
    assert evaluate.main([str(run), f"--tasks={tasks}", *more]) == 1
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert not (run / "evaluations").exists()


def test_tasks_of_the_harness_without_it_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(suite_lib.HarnessTasks.__init__.__globals__["importlib"].util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tasks arc_easy: need lm-evaluation-harness, which is not installed: `pip"):
        Suite(["arc_easy"], ByteTokenizer())
