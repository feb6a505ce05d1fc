"""What a run knows by heart: losses, exposures and extraction, at every kept checkpoint."""

import json
import re
import shutil

import numpy as np
import pytest
from support.models import make_spec
from support.training_runs import flags, train_here

from gpt_pretrain import memorization
from gpt_pretrain.data.stages import Stage
from gpt_pretrain.history import memorization as lib
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.token_losses import losses_of
from gpt_pretrain.model.sampling import continue_greedily, sample
from gpt_pretrain.train import pretrained


@pytest.fixture(scope="module")
def run(tiny_dataset, five_steps, tmp_path_factory) -> str:
    """Five steps, and as many again: two checkpoints."""
    save_dir = tmp_path_factory.mktemp("memorization") / "run"
    shutil.copytree(five_steps, save_dir)
    train_here(flags(tiny_dataset, save_dir, num_steps=10))
    return str(save_dir)


def passages_of(run: OpenedRun, seq_len: int) -> list[lib.Passage]:
    choice = lib.Choice(run, seq_len=seq_len, least_tokens=9, seed=0)
    seen = choice.seen(4)
    return seen + choice.held_out(seen)


def seq_len_of(run: OpenedRun) -> int:
    stage: Stage = run.plan.stages[-1]
    return stage.seq_len


def test_losses_and_exposures_are_those_of_each_document_alone(run):
    opened = OpenedRun(run)
    seq_len = seq_len_of(opened)
    passages = passages_of(opened, seq_len)
    assert {each.group for each in passages} == {"seen", "held out"}
    result = lib.measure(opened, passages, prefix_tokens=4, asked_tokens=4)
    assert result.checkpoints == (5, 10)
    for index, each in enumerate(passages):
        batches = [opened.plan.batch(step) for step in range(10)]
        front = range(each.span.start + 1, each.span.start + len(each.tokens))
        held = {
            batch.step_index + 1
            for batch in batches
            for window in batch.windows.tolist()
            if each.span.split == "train" and set(front) & set(range(window * seq_len, (window + 1) * seq_len + 1))
        }
        assert set(each.steps) == held and bool(held) == (each.group == "seen")
        assert result.exposures[index].tolist() == [sum(s <= 5 for s in held), len(held)]
        for column, step in enumerate(result.checkpoints):
            end = opened.tokenizer(each.span.stream).end_of_text
            alone = losses_of(f"{run}/checkpoints/{step}", each.tokens[None], end_of_text=end)
            np.testing.assert_allclose(result.loss[index, column], alone.nll.mean(), rtol=1e-5)


def test_extraction_counts_the_tokens_up_to_the_first_that_differs(run):
    opened = OpenedRun(run)
    params, metadata = pretrained.load(f"{run}/checkpoints/10")
    (passage, *_) = passages_of(opened, metadata.seq_len)
    prompt = passage.tokens[:5].astype(np.int32)
    new = continue_greedily(params, metadata.model, prompt[None], seq_len=metadata.seq_len, num_tokens=6)[0]
    changed = []
    for wrong in (0, 3, 6):
        tokens = np.concatenate([prompt, new]).astype(passage.tokens.dtype)
        tokens[5 + wrong : 5 + wrong + 1] ^= 1
        changed.append(lib.Passage(passage.span, "seen", tokens, ()))
    changed.append(lib.Passage(passage.span, "seen", passage.tokens[:7], ()))  # too short to be asked
    result = lib.measure(opened, changed, prefix_tokens=4, asked_tokens=6)
    assert result.extracted[:, -1].tolist() == [0, 3, 6, -1]


def test_greedy_continuations_of_many_prompts_are_those_of_each_alone():
    import jax

    from gpt_pretrain.model.gpt import init_params

    spec = make_spec(24)
    params = init_params(spec, jax.random.key(1))
    prompts = np.random.default_rng(0).integers(0, 50, (5, 7)).astype(np.int32)
    found = continue_greedily(params, spec, prompts, seq_len=24, num_tokens=10)
    for prompt, new in zip(prompts, found, strict=True):
        alone = sample(params, spec, prompt, seq_len=24, num_tokens=10, temperature=0.0, top_k=0)
        np.testing.assert_array_equal(new, alone)
    with pytest.raises(ValueError, match="has room for 24"):
        continue_greedily(params, spec, prompts, seq_len=24, num_tokens=30)


def test_the_command_prints_a_table_and_writes_a_page_and_numbers(run, tmp_path, capsys):
    page, numbers = tmp_path / "m.html", tmp_path / "m.json"
    arguments = [run, "--sample", "3", "--prefix_tokens", "4", "--asked_tokens", "4"]
    assert memorization.main([*arguments, "--html", str(page), "--json", str(numbers)]) == 0
    out = capsys.readouterr().out
    assert "seen: loss" in out and "held out: loss" in out and re.search(r"^ +10 ", out, re.M)
    found = json.loads(numbers.read_text())
    assert found["checkpoints"] == [5, 10] and len(found["documents"]) >= 6
    assert {len(each["loss"]) for each in found["documents"]} == {2}
    html = page.read_text()
    assert html.count("<svg") >= 2 and "src=" not in html
    name = next(each["document"] for each in found["documents"] if each["group"] == "seen")  # it has no id
    token = re.fullmatch(r"at token (\d+) of the train split", name)
    assert token and memorization.main([run, "--token", token[1], "--no_held_out", *arguments[3:]]) == 0
    assert "seen in update" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sample", "0"], "expected at least 1"),
        (["--sample", "2", "--prefix_tokens", "0"], "expected at least 1 of each"),
        (["--sample", "2", "--asked_tokens", "5000"], "that the model sees at once"),
        (["--document", "nobody"], "no document has the id nobody"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(run, arguments, words, capsys):
    base = [] if "--prefix_tokens" in arguments or "--asked_tokens" in arguments else ["--prefix_tokens", "4"]
    asked = [] if "--asked_tokens" in arguments else ["--asked_tokens", "4"]
    assert memorization.main([run, *arguments, *base, *asked]) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_damaged_checkpoint_is_skipped(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "5" / "state" / "d")
    opened = OpenedRun(str(copy))
    result = lib.measure(opened, passages_of(opened, seq_len_of(opened)), prefix_tokens=4, asked_tokens=4)
    assert result.checkpoints == (10,) and "Skipping this checkpoint" in caplog.text
