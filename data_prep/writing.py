"""Stage 2 as a whole: streams of tokens -> every file of a prepared dataset, and its manifest."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.card import write_card
from data_prep.cuts import StoredStream, fingerprint_jobs, shard_jobs
from data_prep.engines.local import Report, Workers
from data_prep.pages.progress import Progress
from data_prep.shards import (
    DATASET_NAME,
    FingerprintJob,
    ShardJob,
    fingerprint_blocks,
    tfds_metadata,
    write_shard,
)
from data_prep.store.files import write_json
from data_prep.store.fingerprints import fingerprint
from data_prep.store.manifest import (
    DOCUMENTS,
    FORMAT_VERSION,
    INDEX,
    WORK_DIR,
    Manifest,
    Shard,
    Split,
    dataset_fingerprint,
    save,
    unigram_entropy,
)


def publish(manifest: Manifest, output: Path, num_workers: int) -> None:
    """The last steps, after which the dataset is complete."""
    save(manifest, output)
    try_card(output, num_workers)
    shutil.rmtree(output / WORK_DIR)


def _stage_two(job: ShardJob | FingerprintJob, report: Report) -> Any:
    if isinstance(job, ShardJob):
        return write_shard(job, report)
    return fingerprint_blocks(job, report)


def write_dataset(
    streams: dict[str, StoredStream],
    spec: dict[str, Any],
    output: Path,
    notes: Path,
    workers: Workers,
    tables: dict[str, StoredStream] | None = None,
) -> Manifest:
    """Stage 2: every output file but the manifest, and what the manifest says of them.

    Args:
      notes: a directory for what a continued run has to know of the files that are there.
      tables: the splits' documents, where the files with their tokens don't list them.
    """
    files = []
    for split in streams:
        tokens, listed = streams[split], (tables or streams)[split]
        files += shard_jobs({split: tokens}, spec["formats"], spec, output, notes)
        files += shard_jobs({split: listed}, [DOCUMENTS, INDEX], spec, output, notes)
    digests = fingerprint_jobs(streams, spec)
    results = run_all([*digests, *files], workers)
    shards = tuple(results[job] for job in files)
    splits = {}
    for split, stream in streams.items():
        digest, entropy = stream_digest([results[j] for j in digests if j.split == split])
        found = (s for s in shards if (s.split, s.format) == (split, DOCUMENTS))
        num_documents = sum(shard.num_rows for shard in found)
        splits[split] = Split(stream.num_tokens, num_documents, digest, entropy)
    write_tfds_metadata(output, shards, spec)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=DATASET_NAME,
        spec=spec,
        splits=splits,
        shards=shards,
        fingerprint=dataset_fingerprint(splits, spec["tokenizer_digest"]),
    )


def run_to_the_end(
    function: Callable[[Any, Report], Any],
    jobs: Sequence[Any],
    workers: Workers,
    progress: Progress,
) -> list[Any]:
    """Results of the jobs, in their order.

    Raises ValueError with the messages of all jobs that failed by one, after the others are done.
    """
    results, problems = {}, []
    answers = workers.run(function, jobs, progress)
    with contextlib.closing(answers), contextlib.closing(progress):
        for job, result in answers:
            if isinstance(result, ValueError):
                problems.append(str(result))
            elif isinstance(result, Exception):
                raise result
            results[job] = result
    if problems:
        raise ValueError("\n".join(sorted(problems)))
    return [results[job] for job in jobs]


def run_all(jobs: Sequence[ShardJob | FingerprintJob], workers: Workers) -> dict[Any, Any]:
    """Does stage-two jobs and gives their results by job; raises the first failure."""
    num_tokens = sum(piece.stop - piece.start for job in jobs for piece in job.pieces)
    progress = Progress("write", 2 * num_tokens)
    answers = workers.run(_stage_two, jobs, progress)
    results = {}
    with contextlib.closing(answers), contextlib.closing(progress):
        for job, result in answers:
            if isinstance(result, Exception):
                raise result
            results[job] = result
    return results


def stream_digest(results: Sequence[tuple[list[bytes], np.ndarray]]) -> tuple[str, float]:
    """Fingerprint and unigram entropy of a stream from its fingerprint jobs' results, in order."""
    counts_V = sum((counts for _, counts in results), np.zeros((), np.int64))
    return fingerprint([d for digests, _ in results for d in digests]), unigram_entropy(counts_V)


def try_card(output: Path, num_workers: int) -> None:
    """Writes the dataset card; the dataset is complete without it, so a failure is only said."""
    try:
        write_card(output, num_workers)
    except Exception as error:  # the tokenizer may be a user's, and raise anything
        print(f"no dataset card: {error}", file=sys.stderr)


def write_tfds_metadata(output: Path, shards: Sequence[Shard], spec: dict[str, Any]) -> None:
    """Makes the ArrayRecord shards, if there are any, a dataset for TFDS."""
    records = [shard for shard in shards if shard.format == "array_record"]
    if records:
        metadata = tfds_metadata(records, spec["record_tokens"], spec["vocab_size"])
        for name, value in metadata.items():
            write_json(output / name, value)
