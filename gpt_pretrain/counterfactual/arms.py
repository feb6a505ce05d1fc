"""The arms of a question: runs of their own in OUT/control and OUT/edited, and what comes out of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_prep.store.datasets import TokenDataset
from data_prep.store.documents import DocumentTables
from data_prep.store.places import join
from gpt_pretrain.counterfactual.compare import CompareGradients, CompareWithCheckpoints
from gpt_pretrain.counterfactual.probes import (
    InsertedTokens,
    MeasureLosses,
    Notes,
    Probes,
    notes_at,
    probe_steps,
    whole,
)
from gpt_pretrain.counterfactual.question import Question, checkpoint_name, steps_that_differ
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.branch import Branch
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoint_copies import checkpoint_at, checkpoints_at
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.run_copies import run_at
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import Category
from gpt_pretrain.train.train import train

CONTROL, EDITED = "control", "edited"
_PROMPT_TOKENS, _SAMPLE_TOKENS = 16, 48


@dataclasses.dataclass(frozen=True)
class Arms:
    """What the arms of one question share.

    Attributes:
      directory: of the answer; each arm is a save_dir in it.
      plan: of the edited arm.
      num_probes: about how often losses are measured.
    """

    run: OpenedRun
    question: Question
    directory: str
    plan: Plan
    probes: Probes
    num_probes: int

    def save_dir(self, arm: str) -> str:
        """Of an arm."""
        return join(self.directory, arm)

    def train(self, arm: str, config: TrainConfig, baseline: str | None) -> int:
        """Trains an arm to its end, from where it is; the exit status of `train`.

        Args:
          config: of the arm.
          baseline: a run, with whose checkpoints it is compared where both have come so far.
        """
        asked, begin = self.question.asked, self.question.begin
        there = {} if baseline is None else checkpoints_of(baseline, begin, asked.until)
        is_edited = arm == EDITED

        def actions(built: Built, start: Start) -> list[Action]:
            steps = probe_steps(begin, asked.until, self.question.first, self.num_probes)
            found: list[Action] = [MeasureLosses(self.probes, built, steps, begin=start.step)]
            found.append(CompareWithCheckpoints(there, self.probes, built, begin=start.step))
            if is_edited and self.plan != self.run.plan:
                plans = self.plan, self.run.plan
                found.append(CompareGradients(self.question.first, *plans, built, begin=start.step))
            found.append(WriteSamples(prompts_of(self), built))
            return found

        state = checkpoint_at(checkpoint_name(self.run.save_dir, begin)).directory if begin else None
        plan = self.plan if is_edited else self.run.plan
        return train(config, branch=Branch(plan, asked.until, state, begin, actions))


def checkpoints_of(run: str, begin: int, until: int) -> dict[int, str]:
    """Directories of this machine of a run's checkpoints in steps (begin, until] that can be trusted, by step."""
    found = {}
    for step in checkpoints_at(run):
        if begin < step <= until:
            try:
                found[step] = checkpoint_at(checkpoint_name(run, step)).directory
            except ValueError:
                continue
    return found


def inserted_documents(question: Question, datasets: Mapping[str, TokenDataset]) -> list[InsertedTokens]:
    """The tokens of each inserted document.

    Args:
      datasets: that documents are inserted from, by directory.
    """
    found = []
    for each in question.asked.inserted:
        dataset = datasets[each.directory]
        document = DocumentTables(dataset.directory, cache=dataset.cache).find("id", each.document)[0]
        tokens = dataset.splits["train"].read(np.array([document.start]), document.length)[0]
        found.append(InsertedTokens(each.document, tokens))
    return found


def prompts_of(arms: Arms) -> list[np.ndarray]:
    """What both arms continue: the beginnings of the documents in question, and of the validation split."""
    prompts = []
    for span in arms.question.spans[:3]:
        source = arms.run.dataset(span.stream).splits["train"]
        count = min(_PROMPT_TOKENS, span.stop - span.start)
        prompts.append(source.read(np.array([span.start]), count)[0])
    prompts.append(arms.probes.tokens_NT[-1][:_PROMPT_TOKENS])
    return [each.astype(np.int32) for each in prompts]


class WriteSamples(Action):
    """At the end, continues prompts with the most likely tokens: `samples.json` in the arm's directory."""

    counts_as = Category.EVALUATION
    FILE_NAME = "samples.json"

    def __init__(self, prompts: Sequence[np.ndarray], built: Built):
        self._prompts, self._built = prompts, built

    def at_end(self, now: Now) -> None:
        if not now.is_last:
            return
        params, spec, tokenizer = whole(now.state.params), self._built.spec, self._built.data.tokenizer
        if jax.process_index() != 0:
            return
        notes = Notes(self._built.config.save_dir, self.FILE_NAME, begin=0)
        seq_len = self._built.config.data.seq_len
        for prompt in self._prompts:
            prompt = prompt[: seq_len - 1]
            new = sample(params, spec, prompt, seq_len=seq_len, num_tokens=_SAMPLE_TOKENS, temperature=0.0)
            texts = {"prompt": tokenizer.decode(prompt), "continuation": tokenizer.decode(new)}
            notes.add({"step": now.step, **texts})


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was checked of an arm.

    Attributes:
      num_steps: compared with the ledger of the original.
      differing: steps whose batch is another one than the original's.
      bitwise: at each step where the original has a checkpoint, whether all parameters are equal bit by bit.
    """

    num_steps: int
    differing: tuple[int, ...]
    bitwise: dict[int, bool]


def check(arms: Arms, arm: str) -> Checked:
    """Compares an arm's ledger, and what was noted of its parameters, with the original."""
    ours, theirs = Ledger.read(run_at(arms.save_dir(arm)).directory).digests, arms.run.ledger.digests
    differing = tuple(steps_that_differ(ours, theirs))
    records = notes_at(join(arms.save_dir(arm), CompareWithCheckpoints.FILE_NAME))
    return Checked(min(len(ours), len(theirs)), differing, {each["step"]: each["bitwise_equal"] for each in records})


def lines_of(arms: Arms, arm: str, checked: Checked) -> tuple[bool, list[str]]:
    """Whether an arm is what it should be, and that in words."""
    run, steps = arms.run.save_dir, arms.question.steps
    if arm == CONTROL:
        good = not checked.differing and all(checked.bitwise.values())
        batches = f"all {checked.num_steps} batches are those of {run}"
        if checked.differing:
            batches = f"the batches of {_few(checked.differing)} are NOT those of {run}"
        equal = [step for step, same in checked.bitwise.items() if same]
        unequal = [step for step, same in checked.bitwise.items() if not same]
        parameters = f"parameters bitwise equal at {_few(equal)}" if equal else "it has no checkpoint to compare with"
        if unequal:
            parameters = f"parameters NOT equal at {_few(unequal)}"
        return good, [f"control: {batches}; {parameters}."]
    expected = tuple(step for step in steps if step <= checked.num_steps)
    good = checked.differing == expected
    if good and expected:
        what = "inserted ones" if arms.question.asked.inserted else "occurrences"
        if arms.question.asked.inserted and arms.question.asked.without:
            what = "occurrences and the inserted ones"
        return good, [
            f"edited: the batches of {len(expected)} of {checked.num_steps} steps differ, at exactly the {what}: "
            f"{_few(expected)}."
        ]
    if good:
        return good, [f"edited: all {checked.num_steps} batches are those of {run}."]
    return good, [f"edited: the batches of {_few(checked.differing)} differ, EXPECTED were {_few(expected)}."]


def _few(steps: Sequence[int]) -> str:
    words = ", ".join(map(str, steps[:12])) + (f", ... ({len(steps)} in all)" if len(steps) > 12 else "")
    return f"step{'s' * (len(steps) != 1)} {words or 'none'}"


def result_of(arms: Arms, baseline: str, checked: dict[str, Checked], command: str) -> dict[str, Any]:
    """All that came out, as JSON values.

    Args:
      baseline: the arm that the edited one is compared with: OUT/control, or the run itself.
    """

    def notes(arm: str, name: str) -> list[dict[str, Any]]:
        return notes_at(join(arms.save_dir(arm), name))

    question = arms.question
    names = [CONTROL, EDITED] if CONTROL in checked else [EDITED]
    return {
        "version": 1,
        "run": arms.run.save_dir,
        "command": command,
        "baseline": baseline,
        "asked": question.asked.to_json(),
        "begin": question.begin,
        "first": question.first,
        "steps": list(question.steps),
        "num_rows": question.num_rows,
        "checked": {
            arm: {
                "steps": each.num_steps,
                "differing_steps": list(each.differing),
                "bitwise_equal": {str(step): same for step, same in each.bitwise.items()},
            }
            for arm, each in checked.items()
        },
        "losses": {arm: notes(arm, MeasureLosses.FILE_NAME) for arm in names},
        "distance": notes(EDITED, CompareWithCheckpoints.FILE_NAME),
        "gradients": notes(EDITED, CompareGradients.FILE_NAME),
        "samples": {arm: notes(arm, WriteSamples.FILE_NAME) for arm in names},
    }


def losses_of_checkpoints(arms: Arms) -> list[dict[str, Any]]:
    """The probes' losses by the run's own kept checkpoints, where it stands for the control arm."""
    from gpt_pretrain.train import pretrained

    found = []
    for step in checkpoints_of(arms.run.save_dir, arms.question.begin, arms.question.asked.until):
        params, metadata = pretrained.load(checkpoint_name(arms.run.save_dir, step))
        found.append({"step": step, "loss": arms.probes.losses(params, metadata.model)})
    return found
