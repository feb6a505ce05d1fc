"""Does a run know documents that it was trained on better than others of the same length? At every kept checkpoint:
the loss of each document, and how many of its tokens the model continues word for word from a prefix."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gpt_pretrain.data.stages import Stream
from gpt_pretrain.history.exposures import WindowCounts, count_windows
from gpt_pretrain.history.occurrences import occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, find_spans
from gpt_pretrain.history.token_losses import nll_of
from gpt_pretrain.model.sampling import continue_greedily
from gpt_pretrain.train import pretrained
from gpt_pretrain.train.checkpoint_copies import checkpoints_at

log = logging.getLogger(__name__)
_FEWEST_HELD_OUT = 10
_MOST_CANDIDATES = 100_000  # among which those of the same length are looked for

Group = Literal["seen", "held out"]


@dataclasses.dataclass(frozen=True)
class Passage:
    """The front of a document, as far as the model can see it at once.

    Attributes:
      group: whether the run was trained on it.
      tokens: from the document's end-of-text token on, at most the run's seq_len + 1.
      steps: in which it was seen, from 1, ascending; empty for one that is held out.
    """

    span: Span
    group: Group
    tokens: np.ndarray
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """The document's id, or where it is."""
        document = self.span.document
        return (document and document.id) or f"at token {self.span.start} of the {self.span.split} split"


@dataclasses.dataclass(frozen=True)
class Memorization:
    """What was measured, for passages x checkpoints.

    Attributes:
      checkpoints: updates made, ascending.
      loss: mean over a passage's targets, in nats: float32 (passages, checkpoints).
      exposures: times seen up to the checkpoint: int32, of the same shape.
      extracted: how many tokens after the prefix are continued word for word, in a row: int32, of the same shape; -1
        for a passage too short to be asked.
      prefix_tokens, asked_tokens: what is given (after the end-of-text token), and how much is asked for.
    """

    passages: tuple[Passage, ...]
    checkpoints: tuple[int, ...]
    loss: np.ndarray
    exposures: np.ndarray
    extracted: np.ndarray
    prefix_tokens: int
    asked_tokens: int

    def of_group(self, group: Group) -> np.ndarray:
        """Indices of the passages of a group."""
        return np.flatnonzero([each.group == group for each in self.passages])

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        documents = []
        for index, each in enumerate(self.passages):
            asked = self.extracted[index] >= 0
            documents.append(
                {
                    "document": each.name,
                    "stream": each.span.stream.name,
                    "split": each.span.split,
                    "group": each.group,
                    "tokens": len(each.tokens),
                    "seen_in_updates": list(each.steps),
                    "exposures": self.exposures[index].tolist(),
                    "loss": [round(float(value), 6) for value in self.loss[index]],
                    "extracted_tokens": self.extracted[index].tolist() if asked.all() else None,
                }
            )
        return {
            "version": 1,
            "checkpoints": list(self.checkpoints),
            "prefix_tokens": self.prefix_tokens,
            "asked_tokens": self.asked_tokens,
            "documents": documents,
        }


def measure(
    run: OpenedRun,
    passages: Sequence[Passage],
    *,
    prefix_tokens: int,
    asked_tokens: int,
    on_checkpoint: Callable[[int, int], None] = lambda done, total: None,
) -> Memorization:
    """Asks every kept checkpoint of a run about the passages. Damaged ones are skipped, which is logged.

    Raises ValueError: there is no good checkpoint, or it cannot see so many tokens.
    """
    longest = max(len(each.tokens) for each in passages)
    # Shorter ones are filled up behind, which nothing before it sees.
    tokens_NT = np.zeros((len(passages), max(2, longest)), passages[0].tokens.dtype)
    for row, each in zip(tokens_NT, passages, strict=True):
        row[: len(each.tokens)] = each.tokens
    num_targets = np.array([len(each.tokens) - 1 for each in passages])
    is_target = np.arange(tokens_NT.shape[1] - 1) < num_targets[:, None]
    asked = np.flatnonzero(num_targets >= prefix_tokens + asked_tokens)
    end_of_text = run.tokenizer(passages[0].span.stream).end_of_text
    steps = checkpoints_at(run.save_dir)
    losses, extracted, good = [], [], []
    for number, step in enumerate(steps):
        try:
            params, metadata = pretrained.load(f"{run.save_dir.rstrip('/')}/checkpoints/{step}")
        except ValueError as error:
            log.warning("%s Skipping this checkpoint.", error)
            continue
        if longest - 1 > metadata.model.num_positions or 1 + prefix_tokens + asked_tokens > metadata.seq_len:
            raise ValueError(
                f"checkpoint {step} sees {metadata.seq_len} tokens at once; passages have {longest - 1}, prefix and "
                f"continuation {prefix_tokens} + {asked_tokens} and an end-of-text token"
            )
        nll = nll_of(params, metadata.model, tokens_NT, end_of_text=end_of_text)
        losses.append((nll * is_target).sum(1) / np.maximum(1, num_targets))
        matched = np.full(len(passages), -1, np.int32)
        if len(asked):
            new = continue_greedily(
                params,
                metadata.model,
                tokens_NT[asked, : 1 + prefix_tokens].astype(np.int32),
                seq_len=metadata.seq_len,
                num_tokens=asked_tokens,
            )
            same = new == tokens_NT[asked, 1 + prefix_tokens : 1 + prefix_tokens + asked_tokens]
            matched[asked] = np.cumprod(same, axis=1).sum(1)
        extracted.append(matched)
        good.append(step)
        on_checkpoint(number + 1, len(steps))
    if not good:
        raise ValueError(f"{run.save_dir}: no good checkpoint found; every kept one is asked")
    exposures = [[np.searchsorted(each.steps, step, side="right") for step in good] for each in passages]
    return Memorization(
        tuple(passages),
        tuple(good),
        np.stack(losses, 1).astype(np.float32),
        np.array(exposures, np.int32),
        np.stack(extracted, 1),
        prefix_tokens,
        asked_tokens,
    )


def named_documents(run: OpenedRun, named: Sequence[Mapping[str, Any]], seq_len: int) -> list[Passage]:
    """Documents, each by what `find_spans` takes: {"document": id} or {"token": n}; or {"span": span}. ValueError for
    one that is not there."""
    return [passage_of(run, each.get("span") or find_spans(run, **each)[0], seq_len) for each in named]


def passage_of(run: OpenedRun, span: Span, seq_len: int) -> Passage:
    """The front of a document."""
    stop = min(span.stop, span.start + seq_len + 1)
    source = run.dataset(span.stream).splits[span.split]
    tokens = source.read(np.array([span.start]), stop - span.start)[0]
    found = occurrences_of(run, Span(span.stream, span.split, span.start, stop, span.document))
    # A row that holds nothing but the end-of-text token in front taught nothing of it.
    steps = {
        each.place.step_index + 1
        for each in found
        if each.place.step_index < len(run.ledger) and each.own_span[1] > max(1, each.own_span[0])
    }
    return Passage(span, "seen" if steps else "held out", tokens, tuple(sorted(steps)))


class Choice:
    """Documents to ask about, chosen by a seed among all of a run.

    Args:
      seq_len: how much of a document's front counts.
      least_tokens: shorter documents are passed over.
      num_steps: in which a document may have been seen; None for those that the run has made.
    """

    def __init__(self, run: OpenedRun, *, seq_len: int, least_tokens: int, seed: int, num_steps: int | None = None):
        self._run, self._seq_len, self._least = run, seq_len, least_tokens
        self._random = np.random.default_rng(seed)
        self._counts = count_windows(run.plan, len(run.ledger) if num_steps is None else num_steps)

    def seen(self, count: int) -> list[Passage]:
        """Documents whose whole front was trained on. ValueError if there are none."""
        found = self._all(self._is_front_seen, ("train",))
        if not len(found.starts):
            raise ValueError(
                f"{self._run.save_dir}: no document of at least {self._least} tokens has been seen as far as the "
                f"model sees at once ({self._seq_len} tokens). --document asks about one that was seen in part."
            )
        chosen = self._random.choice(len(found.starts), min(count, len(found.starts)), replace=False)
        return [self._passage(found, index) for index in np.sort(chosen).tolist()]

    def any_seen(self) -> "Documents":
        """All documents of which any token was in a batch."""
        return self._all(lambda counts, starts, lengths: ~_are_unseen(counts, starts, lengths), ("train",))

    def held_out(self, like: Sequence[Passage]) -> list[Passage]:
        """For each passage another one, of about its length, of which the run has seen nothing; none twice, and at
        least `_FEWEST_HELD_OUT` in all where there are as many: the mean of few says little."""
        found = self._all(_are_unseen, ("train", "val"))
        if len(found.starts) > _MOST_CANDIDATES:
            found = found.some(self._random.choice(len(found.starts), _MOST_CANDIDATES, replace=False))
        fronts = np.minimum(found.lengths, self._seq_len + 1)
        is_free = np.ones(len(fronts), bool)
        chosen = []
        for each in itertools.islice(itertools.cycle(like), max(len(like), _FEWEST_HELD_OUT)):
            if not is_free.any():
                break
            distance = np.where(is_free, np.abs(fronts - len(each.tokens)), np.iinfo(np.int64).max)
            # Of those equally near any, not the first ones of the stream.
            nearest = int(self._random.choice(np.flatnonzero(distance == distance.min())))
            is_free[nearest] = False
            chosen.append(self._passage(found, nearest))
        return chosen

    def _is_front_seen(self, counts: Sequence[WindowCounts], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return _are_seen(counts, starts, np.minimum(lengths, self._seq_len + 1))

    def _all(self, is_wanted: Callable[..., np.ndarray], splits: Sequence[str]) -> "Documents":
        """The training documents for which `is_wanted(counts, starts, lengths)`, and all of the other splits."""
        owners: list[tuple[Stream, str]] = []
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for stream in {each.fingerprint: each for each in self._run.streams()}.values():
            for split in splits:
                tables = self._run.documents(stream, split)
                owners.append((stream, split))
                for table in () if tables is None else tables.whole_tables([]):
                    starts, lengths = (table[name].to_numpy() for name in ("start", "length"))
                    chosen = lengths >= self._least
                    if split == "train":
                        chosen &= is_wanted(self._counts.get(stream.fingerprint, []), starts, lengths)
                    owner = np.full(int(chosen.sum()), len(owners) - 1)
                    parts.append((owner, starts[chosen], lengths[chosen]))
        nothing = [(np.empty(0, np.int64),) * 3]
        return Documents(owners, *(np.concatenate(each) for each in zip(*(parts or nothing), strict=True)))

    def span(self, found: "Documents", index: int) -> Span:
        """One of many documents."""
        stream, split = found.owners[int(found.owner[index])]
        start, length = int(found.starts[index]), int(found.lengths[index])
        tables = self._run.documents(stream, split)
        assert tables is not None
        return Span(stream, split, start, start + length, tables.at(start))

    def _passage(self, found: "Documents", index: int) -> Passage:
        return passage_of(self._run, self.span(found, index), self._seq_len)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Many documents: int64 (n,) each.

    Attributes:
      owner: index into `owners`, of the stream and split that a document is of.
    """

    owners: list[tuple[Stream, str]]
    owner: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def some(self, chosen: np.ndarray) -> "Documents":
        return Documents(self.owners, *(each[chosen] for each in (self.owner, self.starts, self.lengths)))


def _are_seen(counts: Sequence[WindowCounts], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether each token but the first of a span was a target, with some length of windows: bool."""
    seen = np.zeros(len(starts), bool)
    for each in counts:
        seen |= each.are_all_targets(starts + 1, starts + lengths)
    return seen


def _are_unseen(counts: Sequence[WindowCounts], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether no token of a span was in any row: bool."""
    seen = np.zeros(len(starts), np.int64)
    for each in counts:
        seen += each.of_spans(starts, starts + lengths)["occurrences"]
    return seen == 0


def by_group(result: Memorization) -> Iterator[tuple[Group, np.ndarray]]:
    """The groups that there are, and the indices of their passages."""
    for group in ("seen", "held out"):
        if len(chosen := result.of_group(group)):
            yield group, chosen
