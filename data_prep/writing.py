"""Stage 2 as a whole: streams of tokens -> every file of a prepared dataset, and its manifest."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_prep.cuts import fingerprint_jobs, shard_jobs
from data_prep.engines.engine import Engine, Report
from data_prep.pages.progress import Progress
from data_prep.shards import FingerprintJob, Fingerprints, ShardJob, fingerprint_blocks, write_shard
from data_prep.store.blocks_file import write_blocks
from data_prep.store.files import write_json
from data_prep.store.fingerprints import fingerprint
from data_prep.store.manifest import (
    DOCUMENTS,
    FORMAT_VERSION,
    INDEX,
    Manifest,
    Shard,
    Split,
    dataset_fingerprint,
    unigram_entropy,
)
from data_prep.store.names import DATASET_NAME
from data_prep.store.places import join
from data_prep.store.spec import Spec
from data_prep.store.streams import StoredStream
from data_prep.store.tfds_metadata import tfds_metadata


def _stage_two(job: ShardJob | FingerprintJob, report: Report) -> Any:
    if isinstance(job, ShardJob):
        return write_shard(job, report)
    return fingerprint_blocks(job, report)


def write_dataset(
    streams: dict[str, StoredStream],
    spec: Spec,
    output: str,
    notes: str,
    workers: Engine,
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
        files += shard_jobs({split: tokens}, spec.formats, spec, output, notes)
        files += shard_jobs({split: listed}, [DOCUMENTS, INDEX], spec, output, notes)
    digests = fingerprint_jobs(streams, spec)
    # By their place in the stream: what is read is read once, and copies from a bucket need not be kept for long.
    results = run_all(sorted([*digests, *files], key=lambda job: (job.split, job.start)), workers)
    shards = tuple(results[job] for job in files)
    splits = {}
    for split, stream in streams.items():
        found = [results[job] for job in digests if job.split == split]
        splits[split] = _split_of(split, stream.num_tokens, shards, found)
        write_blocks(output, split, blocks_of(found))
    write_tfds_metadata(output, shards, spec)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=DATASET_NAME,
        spec=spec,
        splits=splits,
        shards=shards,
        fingerprint=dataset_fingerprint(splits, spec.tokenizer_digest),
    )


def run_to_the_end(
    function: Callable[[Any, Report], Any],
    jobs: Sequence[Any],
    workers: Engine,
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


def run_all(jobs: Sequence[ShardJob | FingerprintJob], workers: Engine) -> dict[Any, Any]:
    """Does stage-two jobs and gives their results by job; raises the first failure."""
    progress = Progress("write", 2 * sum(job.num_tokens for job in jobs))
    answers = workers.run(_stage_two, jobs, progress)
    results = {}
    with contextlib.closing(answers), contextlib.closing(progress):
        for job, result in answers:
            if isinstance(result, Exception):
                raise result
            results[job] = result
    return results


def _split_of(split: str, num_tokens: int, shards: Sequence[Shard], found: Sequence[Fingerprints]) -> Split:
    """What the manifest says of a split, from its fingerprint jobs' results in order."""
    counts_V = sum((each.counts_V for each in found), np.zeros((), np.int64))
    return Split(
        num_tokens=num_tokens,
        num_documents=sum(s.num_rows for s in shards if (s.split, s.format) == (split, DOCUMENTS)),
        fingerprint=fingerprint(blocks_of(found)),
        unigram_entropy=unigram_entropy(counts_V),
    )


def blocks_of(found: Sequence[Fingerprints]) -> list[bytes]:
    """Digests of all blocks, from a split's fingerprint jobs' results in order."""
    return [digest for each in found for digest in each.digests]


def write_tfds_metadata(output: str, shards: Sequence[Shard], spec: Spec) -> None:
    """Makes the ArrayRecord shards, if there are any, a dataset for TFDS."""
    for name, value in tfds_metadata(shards, spec.record_tokens, spec.vocab_size).items():
        write_json(join(output, name), value)
