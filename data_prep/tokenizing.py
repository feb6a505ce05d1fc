"""Stage 1 as a whole: the inputs -> the parts of the stream, or as many of them as are needed."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_prep.agreement import forget_spec, note_failed
from data_prep.engines.engine import Engine
from data_prep.inputs.units import Inspection, inspect
from data_prep.outcome import PreparationError
from data_prep.pages.progress import Progress
from data_prep.parts import Missing, Part, PartJob, find_part, tokenize_unit
from data_prep.store.locations import DamagedInput, InputError
from data_prep.store.spec import Spec, few

INSPECTION_THREADS = 16  # it is mostly waiting for the network


@dataclass(frozen=True)
class Unreadable:
    """An input, or a unit of it, of which there will be no part."""

    path: str
    message: str
    is_damaged: bool  # a good copy of the file would mend it

    @classmethod
    def of(cls, path: str, error: InputError) -> "Unreadable":
        return cls(path, str(error), isinstance(error, DamagedInput))


def inspect_all(paths: Sequence[str], text_column: str) -> list[Inspection]:
    """What can be known of the input files before reading them, in their order.

    Raises InputError: as `inspect`, or the same split of a TFDS dataset is named in two ways.
    """
    with ThreadPoolExecutor(INSPECTION_THREADS) as threads:
        columns = [text_column] * len(paths)
        found = list(threads.map(inspect, paths, range(len(paths)), columns))
    named: dict[str, str] = {}  # by what the inspected file is called
    for path, inspection in zip(paths, found, strict=True):
        same = named.setdefault(inspection.identity["path"], path)
        if same != path:
            raise InputError(f"{path}: is the same input as {same}, which is named before. Name it once.")
    return found


def warnings_about(found: Sequence[Inspection]) -> list[str]:
    """What a user wants to know of the inputs before they are read: which are empty, and which equal another.

    Raises InputError where all of them are empty.
    """
    empty = [inspection.identity["path"] for inspection in found if inspection.is_empty]
    if found and len(empty) == len(found):
        others = f", like the other {len(empty) - 1}" if len(empty) > 1 else ""
        raise InputError(f"{empty[0]}: is empty{others}; there is no text to prepare. Copy or download it again.")
    lines = [f"{path}: is empty; nothing comes of it" for path in empty]
    first: dict[tuple[int, str], str] = {}
    for each in found:
        size, tail = each.identity.get("size"), each.identity.get("tail_sha256")
        if size and tail and not each.is_empty:
            same = first.setdefault((size, tail), each.identity["path"])
            if same != each.identity["path"]:
                lines.append(f"{each.identity['path']}: has the size and the end of {same}; is it a copy?")
    return lines


def part_jobs(
    found: Sequence[Inspection], spec: Spec, directory: str, tokenizer_engine: str, verify: str
) -> list[PartJob | Unreadable]:
    """A job for each unit, in input order, or what is wrong with a whole file."""
    assert spec.text_column is not None, spec
    work: list[PartJob | Unreadable] = []
    for inspection in found:
        if inspection.error:
            work.append(Unreadable.of(inspection.identity["path"], inspection.error))
        work += [
            PartJob(
                unit=unit,
                identity=tuple(str(value) for value in inspection.identity.values()),
                tokenizer=spec.tokenizer,
                tokenizer_digest=spec.tokenizer_digest,
                text_column=spec.text_column,
                directory=directory,
                tokenizer_engine=tokenizer_engine,
                verify=verify,
            )
            for unit in inspection.units
        ]
    return work


class _Prefix:
    """Results without a gap from the front, up to the one that makes `max_tokens` full."""

    def __init__(self, max_tokens: int | None):
        self.results: list[Part | Unreadable | Missing] = []
        self._max_tokens, self._num_tokens = max_tokens, 0

    def is_enough(self) -> bool:
        return self._max_tokens is not None and self._num_tokens >= self._max_tokens

    def extend(self, known: dict[int, Part | Unreadable | Missing]) -> None:
        """Takes those that follow, by their places."""
        while len(self.results) in known and not self.is_enough():
            result = known[len(self.results)]
            self.results.append(result)
            self._num_tokens += result.num_tokens if isinstance(result, Part) else 0


def tokenize(
    work: Sequence[PartJob | Unreadable],
    max_tokens: int | None,
    workers: Engine,
    directory: str,
    *,
    makes_parts: bool = True,
    is_share: bool = False,
) -> list[Part]:
    """The parts of the whole input, or of as much of it as max_tokens needs.

    Args:
      directory: the work directory.
      makes_parts: make what is missing; else it is an error.
      is_share: `work` is the share of one task of several, which leaves the spec alone.

    Raises PreparationError: an input that is needed cannot be read, and everything else is done; or parts are missing.
    """
    jobs = {job: place for place, job in enumerate(work) if isinstance(job, PartJob)}
    known: dict[int, Part | Unreadable | Missing] = {
        place: each for place, each in enumerate(work) if isinstance(each, Unreadable)
    }
    total_bytes = sum(job.unit.num_bytes for job in jobs)
    progress = Progress("tokenize", max_tokens or total_bytes, in_tokens=max_tokens is not None)
    prefix = _Prefix(max_tokens)

    def wanted() -> Iterator[PartJob]:
        for job in jobs:
            if prefix.is_enough():
                return
            yield job

    answers = workers.run(tokenize_unit if makes_parts else find_part, wanted(), progress)
    with contextlib.closing(answers), contextlib.closing(progress):
        for job, result in answers:
            if isinstance(result, InputError):
                result = Unreadable.of(job.unit.path, result)
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
        _give_up(unreadable, directory, is_share)
    if missing := [each for each in prefix.results if isinstance(each, Missing)]:
        raise PreparationError(_missing_in_words(missing, len(prefix.results)))
    return [each for each in prefix.results if isinstance(each, Part)]


def _missing_in_words(missing: Sequence[Missing], num_units: int) -> str:
    named = few([f"{each.unit} ({each.path})" for each in missing])
    return (
        f"{len(missing):,} of {num_units:,} units are not tokenized: {named}. Run the tasks that have them again, or "
        "leave out --require_parts, and they are tokenized here."
    )


def _give_up(unreadable: Sequence[Unreadable], directory: str, is_share: bool) -> None:
    messages = sorted({each.message for each in unreadable})
    if all(each.is_damaged for each in unreadable):
        note_failed(directory, sorted({each.path for each in unreadable}))
        advice = (
            "Replace the damaged input by a good copy under the same name and run the same command again: it continues."
        )
    elif is_share:
        advice = "Mend what is named, and run this task again."
    else:
        # What helps may be other options or other files, which are welcome to what was done.
        forget_spec(directory)
        advice = "Mend what is named, or run with other options or inputs: what is done already is not done again."
    raise PreparationError("\n".join([*messages, f"Everything else is tokenized and kept. {advice}"]))
