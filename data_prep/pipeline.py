"""Inputs -> segments -> shards -> manifest, continuing from whatever is complete already."""

import contextlib
import dataclasses
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.cuts import segment_streams
from data_prep.encoders import choose_engine
from data_prep.engines.local import Workers, locked
from data_prep.inputs.paths import expand
from data_prep.inputs.units import Inspection, inspect
from data_prep.options import Options, differences, make_spec
from data_prep.pages.progress import Progress
from data_prep.parts import Segment, SegmentJob, tokenize_unit
from data_prep.shards import (
    DATASET_NAME,
)
from data_prep.store.files import read_json, write_json
from data_prep.store.locations import InputError, is_remote
from data_prep.store.manifest import (
    DOCUMENTS,
    MANIFEST_NAME,
    WORK_DIR,
    Manifest,
    Source,
    load,
)
from data_prep.store.tokenizers import get_tokenizer
from data_prep.writing import publish, try_card, write_dataset

INSPECTION_THREADS = 16  # it is mostly waiting for the network
OWN_FILES = (f"{DATASET_NAME}_*", f"{DATASET_NAME}-*", f"{DOCUMENTS}_*", "dataset_info.json")


class PreparationError(ValueError):
    """The preparation stopped for a reason that the user can remove; the work done is kept."""


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    was_complete: bool  # nothing was done
    num_empty: int = 0
    num_null: int = 0


def prepare(
    options: Options,
    patterns: str,
    output_dir: str,
    num_workers: int,
    *,
    engine: str = "auto",
    verify: str = "sample",
) -> Outcome:
    """Makes the prepared dataset that `options` ask for in `output_dir`, or finishes making it.

    Args:
      options: what decides the bytes.
      patterns: the files, as `inputs.paths.expand` takes them.
      num_workers: processes; decides nothing but the time it takes, as do the next two.
      engine: what makes the ids, see `encoders.choose_engine`.
      verify: which documents to encode a second time, see `encoders.Verifier`.

    Raises:
      ValueError: a user's mistake, before any work, or PreparationError, after keeping the work.
      engines.WorkerDied: a worker process was killed.
    """
    tokenizer = get_tokenizer(options.tokenizer)
    engine = choose_engine(tokenizer, engine)
    output, work = Path(output_dir), Path(output_dir, WORK_DIR)
    if (output / MANIFEST_NAME).exists():
        return _already_complete(options, patterns, output)
    paths = expand(patterns)
    found = inspect_all(paths, options.text_column)
    spec = make_spec(options, tokenizer, [inspection.identity for inspection in found])
    print(_engine_in_words(tokenizer.name, engine, verify), file=sys.stderr)
    if not (work / "spec.json").exists():
        refuse_strays(output)
    try:
        with locked(work), Workers(num_workers, work) as workers:
            agree_on_spec(spec, output, work)
            jobs = segment_jobs(found, spec, work / "segments", engine, verify)
            segments = _tokenize(jobs, spec["max_tokens"], workers, work)
            try:
                streams = segment_streams(segments, work / "segments", spec)
            except ValueError:
                # Other cuts of the same segments are welcome to this directory.
                (work / "spec.json").unlink()
                raise
            manifest = write_dataset(streams, spec, output, work / "shards", workers)
            sources = tuple(Source(s.name, s.num_tokens, s.digest) for s in segments)
            manifest = dataclasses.replace(manifest, sources=sources)
            publish(manifest, output, num_workers)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_full(output, error, _num_tokens_ahead(work)) from error
    num_empty, num_null = sum(s.num_empty for s in segments), sum(s.num_null for s in segments)
    return Outcome(manifest, False, num_empty, num_null)


def _already_complete(options: Options, patterns: str, output: Path) -> Outcome:
    """Compares the command with the complete dataset in `output`, and does nothing."""
    entries: list[Any] | None = None
    if not is_remote(patterns):
        # The inputs may be gone by now, and need not be there; if they are, they must agree.
        with contextlib.suppress(InputError):
            found = inspect_all(expand(patterns), options.text_column)
            entries = [inspection.identity for inspection in found]
    asked = make_spec(options, get_tokenizer(options.tokenizer), entries or [])
    return confirm_complete(output, asked, None if entries is None else ())


def confirm_complete(
    output: Path,
    spec: dict[str, Any],
    but_inputs: Sequence[str] | None = (),
    fingerprint: str | None = None,
) -> Outcome:
    """The complete dataset in `output`, if it is the one that was asked for.

    Args:
      but_inputs: as for `differences`.
      fingerprint: what it has to be, where that is known.

    Raises ValueError with the differences.
    """
    manifest = load(output)
    lines = differences(manifest.spec, spec, but_inputs=but_inputs)
    if fingerprint not in (None, manifest.fingerprint):
        lines.append(f"fingerprint: {manifest.fingerprint} there, {fingerprint} asked for")
    if lines:
        raise _refusal(output, "holds a dataset", lines)
    if (output / WORK_DIR).exists():  # a kill after the manifest was written
        try_card(output, 1)
        shutil.rmtree(output / WORK_DIR)
    return Outcome(manifest, True)


def _refusal(output: Path, holds: str, lines: Sequence[str]) -> ValueError:
    return ValueError(
        f"{output}: {holds} of another spec:\n  "
        + "\n  ".join(lines)
        + "\nUse the same options, another output directory, or delete that one."
    )


def inspect_all(paths: Sequence[str], text_column: str) -> list[Inspection]:
    """What can be known of the input files before reading them, in their order."""
    with ThreadPoolExecutor(INSPECTION_THREADS) as threads:
        columns = [text_column] * len(paths)
        return list(threads.map(inspect, paths, range(len(paths)), columns))


def refuse_strays(output: Path) -> None:
    """Files of an unknown preparation must not end up among ours."""
    stray = sorted(path.name for pattern in OWN_FILES for path in output.glob(pattern))
    if stray:
        raise ValueError(
            f"{output}: holds {stray[0]}, but neither a manifest nor an unfinished preparation "
            "that could be continued. Use another output directory, or delete that one."
        )


def agree_on_spec(spec: dict[str, Any], output: Path, work: Path) -> None:
    """Continues an unfinished preparation of the same spec, refuses any other."""
    try:
        there = read_json(work / "spec.json")
    except ValueError:
        there = None
    if there is not None:
        # A file that could not be read may be replaced by a better copy.
        replaceable = read_json(work / "failed.json") or []
        if lines := differences(there, spec, but_inputs=replaceable):
            raise _refusal(output, "holds an unfinished preparation", lines)
    for name in ("segments", "shards"):
        (work / name).mkdir(exist_ok=True)
    write_json(work / "spec.json", spec)


def _engine_in_words(tokenizer: str, engine: str, verify: str) -> str:
    if engine != "gigatoken":
        return f"tokenizer {tokenizer}: text by text, without gigatoken"
    checked = {"all": "every document", "none": "no document", "sample": "0.1% of the documents"}
    return f"tokenizer {tokenizer}: by gigatoken; {checked[verify]} checked against the reference"


def segment_jobs(
    found: Sequence[Inspection], spec: dict[str, Any], directory: Path, engine: str, verify: str
) -> list[SegmentJob | str]:
    """A job for each unit, in input order; a str is the error of a whole file."""
    work: list[SegmentJob | str] = []
    for inspection in found:
        identity = tuple(str(value) for value in inspection.identity.values())
        if inspection.error:
            work.append(inspection.error)
        for unit in inspection.units:
            tokenizer = spec["tokenizer"], spec["tokenizer_digest"]
            options = spec["text_column"], str(directory), engine, verify
            work.append(SegmentJob(unit, identity, *tokenizer, *options))
    return work


def _tokenize(
    work: Sequence[SegmentJob | str], max_tokens: int | None, workers: Workers, directory: Path
) -> list[Segment]:
    """Stage 1. The segments of the whole input, or of as much of it as max_tokens needs."""
    jobs = {job: place for place, job in enumerate(work) if isinstance(job, SegmentJob)}
    results: dict[int, Segment | str] = {place: error for place, error in enumerate(work) if isinstance(error, str)}
    total_bytes = sum(job.unit.num_bytes for job in jobs)
    progress = Progress("tokenize", max_tokens or total_bytes, in_tokens=max_tokens is not None)
    prefix: list[Segment | str] = []  # results without a gap from the front
    prefix_tokens = 0

    def enough() -> bool:
        return max_tokens is not None and prefix_tokens >= max_tokens

    def wanted() -> Iterator[SegmentJob]:
        for job in jobs:
            if enough():
                return
            yield job

    answers = workers.run(tokenize_unit, wanted(), progress)
    with contextlib.closing(answers), contextlib.closing(progress):
        for job, result in answers:
            if isinstance(result, InputError):
                result = str(result)
            if isinstance(result, Exception):
                raise result
            results[jobs[job]] = result
            if isinstance(result, Segment) and result.reused:
                progress.skip(result.num_tokens if max_tokens else job.unit.num_bytes)
            while len(prefix) in results and not enough():
                prefix.append(results[len(prefix)])
                prefix_tokens += prefix[-1].num_tokens if isinstance(prefix[-1], Segment) else 0
            if enough():
                break
    while len(prefix) in results and not enough():
        prefix.append(results[len(prefix)])
    failed = {place: text for place, text in enumerate(prefix) if isinstance(text, str)}
    if failed:
        _give_up(failed, directory)
    return [segment for segment in prefix if isinstance(segment, Segment)]


def _give_up(failed: dict[int, str], work: Path) -> None:
    paths = [entry["path"] for entry in read_json(work / "spec.json")["inputs"]]
    messages = sorted(set(failed.values()))
    write_json(
        work / "failed.json",
        [path for path in paths if any(text.startswith(f"{path}:") for text in messages)],
    )
    raise PreparationError(
        "\n".join(messages) + "\nEverything else is tokenized and kept. Replace the damaged "
        "input by a good copy under the same name and run the same command again: it continues."
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; ArrayRecord's writer says it in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EFBIG) in str(error)


def _num_tokens_ahead(work: Path) -> int:
    """A rough estimate of how many tokens the stream will have."""
    spec = read_json(work / "spec.json") or {"inputs": (), "max_tokens": None}
    done = [read_json(path)["segment"] for path in (work / "segments").glob("*.json")]
    # A token is four bytes of text, roughly; parquet is packed 2:1.
    num_tokens = sum(entry["size"] or 0 for entry in spec["inputs"]) // 2
    num_tokens = min(num_tokens, spec["max_tokens"] or num_tokens)
    return max(num_tokens, sum(segment["num_tokens"] for segment in done))


def disk_full(output: Path, error: BaseException, num_tokens: int) -> PreparationError:
    """Free space, and a rough estimate of what is still needed, in words."""
    spec = read_json(output / WORK_DIR / "spec.json") or {"formats": ()}
    there = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    # Two bytes in each copy, of which one is in the work directory.
    needed = max(0, int(2.2 * num_tokens * (1 + len(spec["formats"]))) - there)
    free = shutil.disk_usage(output).free
    return PreparationError(
        f"{output}: no space left ({error}). Free: {free / 1e9:.2f} GB; still needed: about "
        f"{needed / 1e9:.2f} GB. What is complete is kept: make room and run the same command "
        "again."
    )
