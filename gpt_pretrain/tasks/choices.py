"""Multiple choice by log-likelihood, and the files of HellaSwag that need no harness.

    accuracy `acc`        the likeliest completion is the right one: the sum of its tokens' log-likelihoods
    accuracy `acc_norm`   the one with the best mean of its tokens' log-likelihoods is, as llm.c and build-nanogpt count

lm-evaluation-harness has the same `acc`; its `acc_norm` divides the sum by the characters of the completion.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.store.byte_pairs import GPT2Tokenizer
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.tasks.packing import Request
from gpt_pretrain.tasks.task_model import TaskModel

SUFFIXES = (".bin", ".jsonl")
_MAGIC, _VERSION, _HEADER = 20240522, 1, struct.Struct("<256i")
_START = 2**16 - 1
_WRITER = "a file that llm.c's dev/data/hellaswag.py has written"


@dataclasses.dataclass(frozen=True)
class Question:
    """A context, its completions, and which of them is right; as token ids."""

    context: Sequence[int]
    completions: Sequence[Sequence[int]]
    label: int


def read_questions(path: str | os.PathLike, tokenizer: Tokenizer) -> list[Question]:
    """The questions of llm.c's `hellaswag_val.bin` (GPT-2's ids), or of HellaSwag's own .jsonl.

    As llm.c makes them: ids of "ctx", and of each of "endings" with a space before it.

    Raises ValueError for a file that is not there, is damaged, or has ids of another tokenizer.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if Path(path).suffix == ".jsonl":
        return list(_of_lines(path, content, tokenizer))
    if tokenizer.digest != GPT2Tokenizer().digest:
        raise ValueError(
            f"{path}: holds ids of GPT-2's tokenizer, the model's is {tokenizer.name!r:.200}. Use HellaSwag's .jsonl."
        )
    return list(_of_stream(path, content, tokenizer.vocab_size))


def ask(model: TaskModel, questions: Sequence[Question]) -> dict[str, float]:
    """{"acc": ..., "acc_norm": ...} of `read_questions`, with their standard errors and the number of questions."""
    requests = [
        Request(model.context(question.context), completion)
        for question in questions
        for completion in question.completions
    ]
    scores = iter(model.scores(requests))
    hits = np.empty((len(questions), 2))
    for row, question in zip(hits, questions, strict=True):
        found = [next(scores) for _ in question.completions]
        sums = np.array([score.loglikelihood for score in found])
        means = sums / [score.num_tokens for score in found]
        row[:] = [each.argmax() == question.label for each in (sums, means)]
    values: dict[str, float] = {}
    for name, hits_N in zip(("acc", "acc_norm"), hits.T, strict=True):
        values[name] = float(hits_N.mean())
        if len(hits_N) > 1:
            values[f"{name}_stderr"] = float(hits_N.std(ddof=1) / math.sqrt(len(hits_N)))
    return values | {"num_questions": len(questions)}


def _of_stream(path: str | os.PathLike, content: bytes, vocab_size: int) -> Iterator[Question]:
    """llm.c's: 256 int32 (magic, version, number of examples, bytes of the longest), then uint16: for each example
    65535, its bytes, its index, the label, the number of completions, and a count with ids for the context and each
    completion."""

    def refuse(where: str, found: object, expected: object) -> ValueError:
        return ValueError(f"{path}: {where} is {found}, expected {expected}. Is it {_WRITER}, and whole?")

    if len(content) < _HEADER.size or len(content) % 2:
        raise refuse("its size", f"{len(content)} bytes", f"an even number, {_HEADER.size} and more")
    magic, version, num_examples, longest_bytes, *_ = _HEADER.unpack_from(content)
    if (magic, version) != (_MAGIC, _VERSION):
        raise refuse("its beginning (magic, version)", (magic, version), (_MAGIC, _VERSION))
    stream = np.frombuffer(content, "<u2", offset=_HEADER.size).tolist()
    start, longest = 0, 0
    for index in range(num_examples):
        head = stream[start : start + 5]
        where = f"example {index} of {num_examples}, at byte {_HEADER.size + 2 * start},"
        if len(head) < 5:
            raise refuse(where, "cut off", "there")
        mark, num_bytes, number, label, num_completions = head
        if (mark, number) != (_START, index) or num_bytes % 2 or not 0 <= label < num_completions:
            raise refuse(f"{where} (mark, index, label, completions)", (mark, number, label, num_completions),
                         f"({_START}, {index}, a label below the number of completions)")  # fmt: skip
        example = stream[start : start + num_bytes // 2]
        lists, place = [], 5
        for _ in range(num_completions + 1):
            num_ids = example[place] if place < len(example) else 0
            lists.append(example[place + 1 : place + 1 + num_ids])
            if not num_ids or len(lists[-1]) != num_ids or max(lists[-1]) >= vocab_size:
                raise refuse(f"{where} (ids, the largest)", (len(lists[-1]), max(lists[-1], default=None)),
                             f"({num_ids or 'some'}, below {vocab_size})")  # fmt: skip
            place += 1 + num_ids
        if place * 2 != num_bytes:
            raise refuse(f"{where} its length", f"{num_bytes} bytes", f"{place * 2}, those of its parts")
        yield Question(lists[0], lists[1:], label)
        start, longest = start + place, max(longest, num_bytes)
    if start != len(stream) or num_examples < 1:
        raise refuse(f"what follows {num_examples} examples", f"{2 * (len(stream) - start)} bytes", "nothing")
    if longest != longest_bytes:
        raise refuse("the longest example, by the header,", f"{longest_bytes} bytes", longest)


def _of_lines(path: str | os.PathLike, content: bytes, tokenizer: Tokenizer) -> Iterator[Question]:
    num_questions = 0
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields: Any = json.loads(line.decode("utf-8-sig"))
            context, endings, label = fields["ctx"], list(fields["endings"]), int(fields["label"])
            if not isinstance(context, str) or not all(isinstance(each, str) and each for each in endings):
                raise TypeError("ctx and endings are texts")
            if not 0 <= label < len(endings):
                raise ValueError(f"label {label} of {len(endings)} endings")
        except (ValueError, TypeError, KeyError) as error:
            problem = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f'{path}, line {number}: found {problem:.200}; expected {{"ctx": text, "endings": [texts], "label": '
                "index of the right one}, as in HellaSwag's train and val files"
            ) from None
        ids = [tokenizer.encode(text).tolist() for text in (context, *(f" {ending}" for ending in endings))]
        num_questions += 1
        yield Question(ids[0], ids[1:], label)
    if not num_questions:
        raise ValueError(f"{path}: holds no questions; expected HellaSwag's .jsonl, a question a line")
