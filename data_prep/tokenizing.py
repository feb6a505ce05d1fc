"""Stage 1 as a whole: the inputs -> the parts of the stream, or as many of them as are needed."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.agreement import note_failed
from data_prep.engines.local import Workers
from data_prep.inputs.units import Inspection, inspect
from data_prep.outcome import PreparationError
from data_prep.pages.progress import Progress
from data_prep.parts import Part, PartJob, tokenize_unit
from data_prep.store.locations import InputError
from data_prep.store.spec import Spec

INSPECTION_THREADS = 16  # it is mostly waiting for the network


@dataclass(frozen=True)
class Unreadable:
    """An input, or a unit of it, of which there will be no part."""

    path: str
    message: str


def inspect_all(paths: Sequence[str], text_column: str) -> list[Inspection]:
    """What can be known of the input files before reading them, in their order."""
    with ThreadPoolExecutor(INSPECTION_THREADS) as threads:
        columns = [text_column] * len(paths)
        return list(threads.map(inspect, paths, range(len(paths)), columns))


def part_jobs(
    found: Sequence[Inspection], spec: Spec, directory: Path, engine: str, verify: str
) -> list[PartJob | Unreadable]:
    """A job for each unit, in input order, or what is wrong with a whole file."""
    assert spec.text_column is not None, spec
    work: list[PartJob | Unreadable] = []
    for inspection in found:
        if inspection.error:
            work.append(Unreadable(inspection.identity["path"], inspection.error))
        work += [
            PartJob(
                unit=unit,
                identity=tuple(str(value) for value in inspection.identity.values()),
                tokenizer=spec.tokenizer,
                tokenizer_digest=spec.tokenizer_digest,
                text_column=spec.text_column,
                directory=str(directory),
                engine=engine,
                verify=verify,
            )
            for unit in inspection.units
        ]
    return work


class _Prefix:
    """Results without a gap from the front, up to the one that makes `max_tokens` full."""

    def __init__(self, max_tokens: int | None):
        self.results: list[Part | Unreadable] = []
        self._max_tokens, self._num_tokens = max_tokens, 0

    def is_enough(self) -> bool:
        return self._max_tokens is not None and self._num_tokens >= self._max_tokens

    def extend(self, known: dict[int, Part | Unreadable]) -> None:
        """Takes those that follow, by their places."""
        while len(self.results) in known and not self.is_enough():
            result = known[len(self.results)]
            self.results.append(result)
            self._num_tokens += result.num_tokens if isinstance(result, Part) else 0


def tokenize(
    work: Sequence[PartJob | Unreadable], max_tokens: int | None, workers: Workers, directory: Path
) -> list[Part]:
    """The parts of the whole input, or of as much of it as max_tokens needs.

    Args:
      directory: the work directory.

    Raises PreparationError: an input that is needed cannot be read; everything else is done.
    """
    jobs = {job: place for place, job in enumerate(work) if isinstance(job, PartJob)}
    known: dict[int, Part | Unreadable] = {i: each for i, each in enumerate(work) if isinstance(each, Unreadable)}
    total_bytes = sum(job.unit.num_bytes for job in jobs)
    progress = Progress("tokenize", max_tokens or total_bytes, in_tokens=max_tokens is not None)
    prefix = _Prefix(max_tokens)

    def wanted() -> Iterator[PartJob]:
        for job in jobs:
            if prefix.is_enough():
                return
            yield job

    answers = workers.run(tokenize_unit, wanted(), progress)
    with contextlib.closing(answers), contextlib.closing(progress):
        for job, result in answers:
            if isinstance(result, InputError):
                result = Unreadable(job.unit.path, str(result))
            if isinstance(result, Exception):
                raise result
            known[jobs[job]] = result
            if isinstance(result, Part) and result.reused:
                progress.skip(result.num_tokens if max_tokens else job.unit.num_bytes)
            prefix.extend(known)
            if prefix.is_enough():
                break
    prefix.extend(known)
    if unreadable := [each for each in prefix.results if isinstance(each, Unreadable)]:
        _give_up(unreadable, directory)
    return [each for each in prefix.results if isinstance(each, Part)]


def _give_up(unreadable: Sequence[Unreadable], directory: Path) -> None:
    note_failed(directory, sorted({each.path for each in unreadable}))
    messages = sorted({each.message for each in unreadable})
    raise PreparationError(
        "\n".join(messages) + "\nEverything else is tokenized and kept. Replace the damaged "
        "input by a good copy under the same name and run the same command again: it continues."
    )
