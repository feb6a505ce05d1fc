"""Adds the other format to a prepared dataset: `python -m data_prep.convert DIR --to=array_record`.

The result is, byte for byte, what preparing both formats at once would have given; killed, it is
continued by the same command.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

from data_prep.manifest import DOCUMENTS, FORMATS, WORK_DIR, Manifest, load, save


def convert(directory: str | Path, to: str, num_workers: int = 1) -> Manifest:
    """Writes the shards of format `to` from the stored ones, and names them in the manifest.

    Raises ValueError: no dataset there, an unknown format, or stored shards that are damaged.
    """
    from data_prep import engines
    from data_prep.pipeline import run_all, stream_digest, write_tfds_metadata
    from data_prep.plan import StoredStream, fingerprint_jobs, shard_jobs
    from data_prep.shards import Piece

    if to not in FORMATS:
        raise ValueError(f"--to={to}: expected one of {', '.join(FORMATS)}")
    directory = Path(directory)
    manifest = load(directory)
    stored = manifest.spec["formats"]
    if to in stored:
        return manifest
    formats = [name for name in FORMATS if name in (*stored, to)]
    spec = manifest.spec | {"formats": formats}
    streams = {
        split: StoredStream(
            Piece(str(directory / s.name), s.format, s.sha256, 0, s.num_tokens)
            for s in manifest.shards_of(split, stored[0])
        )
        for split in manifest.splits
    }
    work = directory / WORK_DIR
    with engines.locked(work):
        (work / "shards").mkdir(exist_ok=True)
        files = shard_jobs(streams, [to], spec, directory, work / "shards")
        digests = fingerprint_jobs(streams, spec)
        results = run_all([*digests, *files], num_workers, work)
        for split, expected in manifest.splits.items():
            found, _ = stream_digest([results[job] for job in digests if job.split == split])
            if found != expected.fingerprint:
                raise ValueError(
                    f"{directory}: split {split} as {stored[0]} has fingerprint {found}, expected "
                    f"{expected.fingerprint}. Run `python -m data_prep.check {directory}`."
                )
        new = manifest.shards + tuple(results[job] for job in files)
        shards = tuple(
            shard
            for split in manifest.splits
            for format in (*formats, DOCUMENTS)
            for shard in new
            if (shard.split, shard.format) == (split, format)
        )
        write_tfds_metadata(directory, shards, spec)
        manifest = dataclasses.replace(manifest, spec=spec, shards=shards)
        save(manifest, directory)
        shutil.rmtree(work)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for an error that the user can remove."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.convert", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to add")
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args(argv)
    from data_prep.engines import WorkerDied

    try:
        manifest = convert(args.directory, args.to, args.num_workers)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.directory}: holds {' and '.join(manifest.spec['formats'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
