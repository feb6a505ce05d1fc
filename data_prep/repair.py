"""Makes lost or damaged files of a prepared dataset again, and no others.

A token file comes from the other stored format where that is whole, and is a table of documents or
an index wanted, or is there no other format, from the inputs: only the units that the file's range
of the stream came from are tokenized. A file counts as repaired when it has the digest that the
manifest says, so a repair can never put other bytes in place. The manifest may be a stranger's: what it says is
checked before it leads anywhere.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_prep.agreement import SHARDS
from data_prep.cuts import fingerprint_jobs, shard_jobs, split_streams
from data_prep.encoders import choose_engine
from data_prep.engines.local import Workers
from data_prep.engines.locks import locked
from data_prep.inputs.paths import TFDS
from data_prep.inputs.units import Inspection, input_of, inspect
from data_prep.pages.progress import Progress
from data_prep.parts import PARTS, PartJob, name_of, part_range, tokenize_unit
from data_prep.shards import ShardJob
from data_prep.store.blocks_file import blocks_problem, write_blocks
from data_prep.store.fingerprints import fingerprint
from data_prep.store.locations import EMBEDDED, InputError, is_remote
from data_prep.store.manifest import DOCUMENTS, INDEX, WORK_DIR, Manifest, Shard, load
from data_prep.store.names import blocks_name
from data_prep.store.places import join, make_directory, remove_tree
from data_prep.store.spec import FORMATS
from data_prep.store.streams import StoredStream, stored_stream
from data_prep.store.tokenizers import dataset_tokenizer, safe_name
from data_prep.tokenizing import Unreadable, part_jobs
from data_prep.writing import blocks_of, run_all, write_tfds_metadata

PROTOCOLS = ("https", "http", "hf", "gs", "s3")  # of a URL in a manifest that is fetched


class RepairError(ValueError):
    """What is needed to make a file again is not there, or is not what it was."""


def repair(directory: str, damaged: Sequence[Shard], num_workers: int, tokenizer: str | None = None) -> Iterator[str]:
    """Makes the files again; a sentence for each.

    Args:
      tokenizer: as the user typed it, where the dataset was made by one that is not ours.

    Raises:
      RepairError: a file cannot be made again; those before it are repaired.
      ValueError: as `manifest.load`.
    """
    directory = join(directory)
    manifest = load(directory)
    work = join(directory, WORK_DIR)
    names = {shard.name for shard in damaged}
    for folder in (work, join(work, PARTS), join(work, SHARDS)):
        if os.path.islink(folder):
            raise RepairError(f"{folder}: is a link; nothing is written where it leads. Remove it.")
    with locked(work) as hold, Workers(num_workers, hold.workers) as workers:
        for name in (PARTS, SHARDS):
            make_directory(join(work, name))
        from_shards, from_inputs = _plan(directory, manifest, names, work)
        if from_shards:
            yield from _write_again(from_shards, damaged, workers, "the other format")
        if from_inputs:
            _tokenize_again(manifest, from_inputs, workers, work, tokenizer)
            yield from _write_again(from_inputs, damaged, workers, "the inputs")
        write_tfds_metadata(directory, manifest.shards, manifest.spec)
        yield from _write_blocks_again(directory, manifest, workers)
    remove_tree(work)


def _write_again(jobs: Sequence[ShardJob], damaged: Sequence[Shard], workers: Workers, origin: str) -> Iterator[str]:
    made = run_all(jobs, workers)
    expected = {shard.name: shard for shard in damaged}
    for job in jobs:
        found, wanted = made[job], expected[job.name]
        if found != wanted:
            raise RepairError(
                f"{job.path}: made again from {origin} it has digest "
                f"{found.digest}, expected {wanted.digest}: another version of data_prep "
                "or of one of its libraries wrote this dataset. Prepare it again."
            )
        yield f"{job.path}: made again from {origin}"


def _write_blocks_again(directory: str, manifest: Manifest, workers: Workers) -> Iterator[str]:
    """The files of block digests that are missing or damaged, from the stream: all else is whole by now."""
    for name, split in manifest.splits.items():
        if not blocks_problem(directory, name, split):
            continue
        stream = stored_stream(directory, manifest, name, manifest.spec.formats[0])
        jobs = fingerprint_jobs({name: stream}, manifest.spec)
        results = run_all(jobs, workers)
        digests, path = blocks_of([results[job] for job in jobs]), join(directory, blocks_name(name))
        if (found := fingerprint(digests)) != split.fingerprint:
            raise RepairError(
                f"{path}: the {name} stream has the fingerprint {found}, the manifest says {split.fingerprint}. "
                "Prepare the dataset again."
            )
        write_blocks(directory, name, digests)
        yield f"{path}: made again from the stream"


def _plan(directory: str, manifest: Manifest, names: set[str], work: str) -> tuple[list[ShardJob], list[ShardJob]]:
    """Jobs for the damaged files: those from other shards, and those from the inputs."""
    spec = manifest.spec
    _check_cut(directory, manifest)
    from_shards: list[ShardJob] = []
    left = set(names)
    for format in spec.formats:
        # The other format can serve where every shard of it that is needed is whole.
        for other in (f for f in spec.formats if f != format):
            streams = {s: stored_stream(directory, manifest, s, other) for s in manifest.splits}
            for job in shard_jobs(streams, [format], spec, directory, join(work, SHARDS)):
                whole = not any(os.path.basename(each.path) in names for each in job.ranges)
                if job.name in left and whole:
                    from_shards.append(job)
                    left.remove(job.name)
    if not left:
        return from_shards, []
    if not manifest.sources:
        raise RepairError(
            f"{join(directory, min(left))}: this dataset was converted from shards, not made from text: convert them "
            "again."
        )
    streams = _source_streams(directory, manifest, join(work, PARTS))
    jobs = shard_jobs(streams, [*FORMATS, DOCUMENTS, INDEX], spec, directory, join(work, SHARDS))
    from_inputs = [job for job in jobs if job.name in left]
    if foreign := left - {job.name for job in from_inputs}:
        raise RepairError(
            f"{join(directory, min(foreign))}: no such file comes of this spec. Prepare the dataset again."
        )
    return from_shards, from_inputs


def _source_streams(directory: str, manifest: Manifest, parts: str) -> dict[str, StoredStream]:
    """The splits' streams as they were when the parts were still there."""
    for source in manifest.sources:
        if not re.fullmatch(r"\d{5,}-\d{6,}", source.unit):
            raise RepairError(f"{directory}: {source.unit!r:.80} is no unit of text. Prepare the dataset again.")
    num_there = sum(source.num_tokens for source in manifest.sources)
    num_needed = sum(split.num_tokens for split in manifest.splits.values())
    if num_there < num_needed:
        raise RepairError(f"{directory}: its units have {num_there} tokens, its splits {num_needed}. Prepare it again.")
    whole = StoredStream(part_range(parts, each.unit, each.num_tokens, each.digest) for each in manifest.sources)
    num_val = manifest.splits["val"].num_tokens if "val" in manifest.splits else 0
    return split_streams(whole, num_val, num_val + manifest.splits["train"].num_tokens)


def _tokenize_again(
    manifest: Manifest, jobs: Sequence[ShardJob], workers: Workers, work: str, tokenizer: str | None
) -> None:
    """Makes the parts that the jobs need, from inputs that are still what they were."""
    wanted = {name_of(each) for job in jobs for each in job.ranges}
    units = _unit_jobs(manifest, wanted, join(work, PARTS), tokenizer)
    progress = Progress("tokenize", sum(job.unit.num_bytes for job in units))
    digests = {source.unit: source.digest for source in manifest.sources}
    with contextlib.closing(progress):
        for job, result in workers.run(tokenize_unit, units, progress):
            if isinstance(result, Exception):
                raise result
            if result.digest != digests[job.unit.name]:
                raise RepairError(
                    f"{job.unit.path}: unit {job.unit.name} gives other tokens than it did when the "
                    "dataset was made; its content was changed. Restore the file."
                )


def _unit_jobs(manifest: Manifest, wanted: set[str], directory: str, users: str | None) -> list[PartJob]:
    """The jobs that make the parts of these names; RepairError unless everything is there and as it was."""
    spec, dataset = manifest.spec, os.path.dirname(os.path.dirname(directory))
    if spec.text_column is None:
        raise RepairError(f"{dataset}: has units of text, but was not made from text. Prepare the dataset again.")
    try:
        tokenizer = dataset_tokenizer(spec, dataset, users)
        spec = replace(spec, tokenizer=users or safe_name(spec.tokenizer, dataset))  # for the workers
    except ValueError as error:
        raise RepairError(str(error)) from error
    inputs = sorted({input_of(name) for name in wanted})
    if inputs and inputs[-1] >= len(spec.inputs):
        raise RepairError(f"{dataset}: a unit is of input {inputs[-1]}, there are {len(spec.inputs)}.")
    found = [_inspect(spec.inputs[index], index, manifest.spec.text_column or "") for index in inputs]
    jobs: list[PartJob] = []
    for job in part_jobs(found, spec, directory, choose_engine(tokenizer), "sample"):
        if isinstance(job, Unreadable):
            raise RepairError(job.message)
        if job.unit.name in wanted:
            jobs.append(job)
    if missing := wanted - {job.unit.name for job in jobs}:
        raise RepairError(f"{dataset}: its inputs have no unit {min(missing)}. Prepare the dataset again.")
    return jobs


def _inspect(entry: Mapping[str, Any], index: int, text_column: str) -> Inspection:
    """An input as it is now; RepairError unless it is what the manifest says."""
    _check_reachable(entry["path"])
    try:
        inspection = inspect(entry["path"], index, text_column)
    except InputError as error:
        raise RepairError(f"{error}. The dataset was made from it: restore it.{_of_secrets(entry)}") from error
    if inspection.error:
        raise RepairError(f"{inspection.error}. The dataset was made from it: restore it.{_of_secrets(entry)}")
    if inspection.identity != entry:
        raise RepairError(
            f"{entry['path']}: was changed since the dataset was made: {inspection.identity}, "
            f"expected {entry}. Restore the file."
        )
    return inspection


def _check_cut(directory: str, manifest: Manifest) -> None:
    """RepairError unless the manifest has about as many files as its spec cuts the splits into."""
    for name, split in manifest.splits.items():
        expected = -(-split.num_tokens // manifest.spec.shard_tokens)
        found = len(manifest.shards_of(name, DOCUMENTS))
        if expected != found:
            raise RepairError(
                f"{directory}: {name} has {found} tables of documents, its spec cuts it into {expected}. Prepare the "
                "dataset again."
            )


def _check_reachable(path: str) -> None:
    """RepairError for what a manifest must not make us open: other protocols, and what is no file."""
    if is_remote(path):
        if not re.match(rf"(?:{'|'.join(PROTOCOLS)})://(?!.*::)", path):
            raise RepairError(f"{path!r:.200}: expected a file, or a URL of {', '.join(PROTOCOLS)}")
    elif not path.startswith((EMBEDDED, TFDS)) and os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise RepairError(f"{path!r:.200}: is no file. The dataset was made from it: restore it.")


def _of_secrets(entry: Mapping[str, Any]) -> str:
    """What else there is to know of an input that was not reached."""
    if not is_remote(entry["path"]):
        return ""
    return (
        " User names, passwords and signatures of a URL are not recorded: where it needs one, prepare the dataset "
        "again with the whole URL."
    )
