"""Makes lost or damaged files of a prepared dataset again, and no others.

A token file comes from the other stored format where that is whole, and is a table of documents or
an index wanted, or is there no other format, from the inputs: only the units that the file's range
of the stream came from are tokenized. A file counts as repaired when it has the digest that the
manifest says, so a repair can never put other bytes in place.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.cuts import StoredStream, dataset_stream, shard_jobs
from data_prep.encoders import choose_engine
from data_prep.engines.local import Workers, locked
from data_prep.inputs.units import inspect
from data_prep.pages.progress import Progress
from data_prep.parts import Segment, SegmentJob, tokenize_unit, tokens_path
from data_prep.pipeline import segment_jobs
from data_prep.shards import Piece, ShardJob
from data_prep.store.locations import InputError
from data_prep.store.manifest import DOCUMENTS, FORMATS, INDEX, WORK_DIR, Manifest, Shard, load
from data_prep.store.tokenizers import get_tokenizer
from data_prep.writing import run_all, write_tfds_metadata


class RepairError(ValueError):
    """What is needed to make a file again is not there, or is not what it was."""


def repair(directory: str | Path, damaged: Sequence[Shard], num_workers: int) -> Iterator[str]:
    """Makes the files again; a sentence for each.

    Raises:
      RepairError: a file cannot be made again; those before it are repaired.
      ValueError: as `manifest.load`.
    """
    directory = Path(directory)
    manifest = load(directory)
    work = directory / WORK_DIR
    names = {shard.name for shard in damaged}
    with locked(work), Workers(num_workers, work) as workers:
        for name in ("segments", "shards"):
            (work / name).mkdir(exist_ok=True)
        from_shards, from_inputs = _plan(directory, manifest, names, work)
        for jobs, origin in [(from_shards, "the other format"), (from_inputs, "the inputs")]:
            if not jobs:
                continue
            if origin == "the inputs":
                _tokenize_again(manifest, jobs, workers, work)
            made = run_all(jobs, workers)
            expected = {shard.name: shard for shard in damaged}
            for job in jobs:
                found, wanted = made[job], expected[job.name]
                if found != wanted:
                    raise RepairError(
                        f"{directory / job.name}: made again from {origin} it has digest "
                        f"{found.digest}, expected {wanted.digest}: another version of data_prep "
                        "or of one of its libraries wrote this dataset. Prepare it again."
                    )
                yield f"{directory / job.name}: made again from {origin}"
        write_tfds_metadata(directory, manifest.shards, manifest.spec)
    shutil.rmtree(work)


def _plan(directory: Path, manifest: Manifest, names: set[str], work: Path) -> tuple[list[ShardJob], list[ShardJob]]:
    """Jobs for the damaged files: those from other shards, and those from the inputs."""
    spec = manifest.spec
    from_shards: list[ShardJob] = []
    left = set(names)
    for format in spec["formats"]:
        # The other format can serve where every shard of it that is needed is whole.
        for other in (f for f in spec["formats"] if f != format):
            streams = {s: dataset_stream(directory, manifest, s, other) for s in manifest.splits}
            for job in shard_jobs(streams, [format], spec, directory, work / "shards"):
                whole = not any(Path(piece.path).name in names for piece in job.pieces)
                if job.name in left and whole:
                    from_shards.append(job)
                    left.remove(job.name)
    if not left:
        return from_shards, []
    if not manifest.sources:
        raise RepairError(
            f"{directory / min(left)}: this dataset was converted from shards, not made from text: convert them again."
        )
    streams = _source_streams(manifest, work / "segments")
    jobs = shard_jobs(streams, [*FORMATS, DOCUMENTS, INDEX], spec, directory, work / "shards")
    return from_shards, [job for job in jobs if job.name in left]


def _source_streams(manifest: Manifest, segments: Path) -> dict[str, StoredStream]:
    """The splits' streams as they were when the segments were still there."""
    whole = StoredStream(
        Piece(str(tokens_path(segments, s.unit)), "segment", s.digest, 0, s.num_tokens) for s in manifest.sources
    )
    num_val = manifest.splits["val"].num_tokens if "val" in manifest.splits else 0
    total = num_val + manifest.splits["train"].num_tokens
    ranges = {"train": (num_val, total), "val": (0, num_val)}
    return {name: StoredStream(whole.pieces(*ranges[name])) for name in manifest.splits}


def _tokenize_again(manifest: Manifest, jobs: Sequence[ShardJob], workers: Workers, work: Path) -> None:
    """Makes the segments that the jobs need, from inputs that are still what they were."""
    spec = manifest.spec
    tokenizer = get_tokenizer(spec["tokenizer"])
    if tokenizer.digest != spec["tokenizer_digest"]:
        raise RepairError(
            f"tokenizer {spec['tokenizer']} has digest {tokenizer.digest}, but the dataset was "
            f"made with {spec['tokenizer_digest']}. Install the version that made it."
        )
    wanted = {Path(piece.path).stem for job in jobs for piece in job.pieces}
    found = [
        _inspect(entry, index, spec["text_column"])
        for index, entry in enumerate(spec["inputs"])
        if any(name.startswith(f"{index:05d}-") for name in wanted)
    ]
    engine = choose_engine(tokenizer)
    units: list[SegmentJob] = []
    for job in segment_jobs(found, spec, work / "segments", engine, "sample"):
        if isinstance(job, str):
            raise RepairError(job)
        if job.unit.name in wanted:
            units.append(job)
    progress = Progress("tokenize", sum(job.unit.num_bytes for job in units))
    digests = {source.unit: source.digest for source in manifest.sources}
    for job, result in workers.run(tokenize_unit, units, progress):
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Segment)
        if result.digest != digests[job.unit.name]:
            raise RepairError(
                f"{job.unit.path}: unit {job.unit.name} gives other tokens than it did when the "
                "dataset was made; its content was changed. Restore the file."
            )
    progress.close()


def _inspect(entry: dict[str, Any], index: int, text_column: str):
    """An input as it is now; RepairError unless it is what the manifest says."""
    try:
        inspection = inspect(entry["path"], index, text_column)
    except InputError as error:
        raise RepairError(f"{error}. The dataset was made from it: restore it.") from error
    if inspection.identity != entry:
        raise RepairError(
            f"{entry['path']}: was changed since the dataset was made: {inspection.identity}, "
            f"expected {entry}. Restore the file."
        )
    return inspection
