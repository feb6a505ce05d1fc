"""Verifies a prepared dataset: `python -m data_prep.check DIR`.

Every size and digest, every count, the table of documents against the stream, and the
fingerprint, computed anew from each stored format. One line for each problem; exit status 1.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import sha256_of
from data_prep.manifest import (
    DOCUMENTS,
    MANIFEST_NAME,
    Manifest,
    Shard,
    Split,
    dataset_fingerprint,
    load,
    unigram_entropy,
)

OWN_FILES = ("fineweb_*", "fineweb-*", "documents_*", ".*", "dataset_info.json", "features.json")


@dataclass
class Scan:
    """What one pass over a stored stream finds."""

    num_tokens: int
    fingerprint: str
    counts_V: np.ndarray
    document_starts: np.ndarray  # positions of end-of-text


def find_problems(directory: str | Path) -> Iterator[str]:
    """A sentence for each thing that is wrong, starting with the file's path.

    Raises ValueError when there is no manifest to compare with.
    """
    directory = Path(directory)
    manifest = load(directory)
    good = set()
    for shard in manifest.shards:
        problem = _check_file(directory / shard.name, shard)
        if problem:
            yield f"{directory / shard.name}: {problem}"
        else:
            good.add(shard.name)
    yield from _check_manifest(directory / MANIFEST_NAME, manifest)
    for name, split in manifest.splits.items():
        tables = manifest.shards_of(name, DOCUMENTS)
        starts = None
        if all(shard.name in good for shard in tables):
            starts = yield from _check_documents(directory, tables, split)
        for format in manifest.spec["formats"]:
            shards = manifest.shards_of(name, format)
            if shards and all(shard.name in good for shard in shards):
                yield from _check_stream(directory, manifest, shards, split, starts)
    yield from _check_other_files(directory, manifest)


def _check_file(path: Path, shard: Shard) -> str:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != shard.num_bytes:
        return f"{size} bytes, expected {shard.num_bytes}; it was cut short or written to"
    digest = sha256_of(path)
    if digest != shard.sha256:
        return f"sha256 {digest}, expected {shard.sha256}; its content was changed"
    return ""


def _check_manifest(path: Path, manifest: Manifest) -> Iterator[str]:
    """The manifest against itself."""
    found = dataset_fingerprint(manifest.splits, manifest.spec["tokenizer_digest"])
    if found != manifest.fingerprint:
        yield f"{path}: fingerprint {manifest.fingerprint}, but its splits give {found}"
    for name, split in manifest.splits.items():
        for format in (*manifest.spec["formats"], DOCUMENTS):
            found = sum(shard.num_tokens for shard in manifest.shards_of(name, format))
            if found != split.num_tokens:
                yield (
                    f"{path}: split {name} has {split.num_tokens} tokens, but its {format} files "
                    f"have {found}"
                )


def _check_documents(
    directory: Path, tables: tuple[Shard, ...], split: Split
) -> Generator[str, None, np.ndarray]:
    """Whether the documents follow one another without gap; returns their starts."""
    import pyarrow.parquet as pq

    position, starts = 0, []
    range_start = 0
    for shard in tables:
        path = directory / shard.name
        table = pq.ParquetFile(path).read(columns=["start", "length"])
        starts_D, lengths_D = (table[name].to_numpy() for name in ("start", "length"))
        if len(starts_D) != shard.num_rows:
            yield f"{path}: {len(starts_D)} documents, the manifest says {shard.num_rows}"
        expected_D = position + np.concatenate([[0], np.cumsum(lengths_D)])
        wrong = np.flatnonzero(starts_D != expected_D[:-1])
        if len(wrong):
            row = int(wrong[0])
            yield f"{path}: row {row} starts at {starts_D[row]}, expected {expected_D[row]}"
        range_stop = range_start + shard.num_tokens
        if len(starts_D) and (starts_D[0] < range_start or starts_D[-1] >= range_stop):
            yield f"{path}: lists documents that start outside [{range_start}, {range_stop})"
        position, range_start = int(expected_D[-1]), range_stop
        starts.append(starts_D)
    starts_D = np.concatenate(starts) if starts else np.empty(0, np.int64)
    where = directory / DOCUMENTS
    if position != split.num_tokens:
        yield f"{where}_*: documents end at token {position}, the split at {split.num_tokens}"
    if len(starts_D) != split.num_documents:
        yield f"{where}_*: {len(starts_D)} documents, the manifest says {split.num_documents}"
    return starts_D


def _check_stream(
    directory: Path,
    manifest: Manifest,
    shards: tuple[Shard, ...],
    split: Split,
    document_starts: np.ndarray | None,
) -> Iterator[str]:
    name, format = shards[0].split, shards[0].format
    where = f"{directory}: split {name} as {format}"
    try:
        scan = scan_stream(directory, shards, manifest.spec)
    except ValueError as error:  # digests agree, but the file was bad when it was written
        yield str(error)
        return
    if scan.num_tokens != split.num_tokens:
        yield f"{where}: {scan.num_tokens} tokens, the manifest says {split.num_tokens}"
    if scan.fingerprint != split.fingerprint:
        yield f"{where}: fingerprint {scan.fingerprint}, expected {split.fingerprint}"
    entropy = unigram_entropy(scan.counts_V)
    if abs(entropy - split.unigram_entropy) > 1e-6:
        yield f"{where}: unigram entropy {entropy}, the manifest says {split.unigram_entropy}"
    vocab_size = manifest.spec["vocab_size"]
    if scan.counts_V[vocab_size:].any():
        yield f"{where}: holds ids that the tokenizer does not have ({vocab_size} and more)"
    if document_starts is not None and not np.array_equal(scan.document_starts, document_starts):
        yield f"{where}: end-of-text is not exactly where the documents tables say"


def scan_stream(directory: Path, shards: tuple[Shard, ...], spec: dict) -> Scan:
    """Reads a split in one format from end to end."""
    from data_prep.fingerprints import block_digests, fingerprint
    from data_prep.shards import Piece, read_pieces

    pieces = [Piece(str(directory / s.name), s.format, s.sha256, 0, s.num_tokens) for s in shards]
    scan = Scan(0, "", np.zeros(1 << 16, np.int64), np.empty(0, np.int64))
    starts = [scan.document_starts]

    def seen() -> Iterator[np.ndarray]:
        for chunk in read_pieces(pieces, spec["record_tokens"]):
            scan.counts_V += np.bincount(chunk, minlength=1 << 16)
            starts.append(np.flatnonzero(chunk == spec["end_of_text"]) + scan.num_tokens)
            scan.num_tokens += len(chunk)
            yield chunk

    scan.fingerprint = fingerprint(list(block_digests(seen())))
    scan.document_starts = np.concatenate(starts)
    return scan


def _check_other_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The files for TFDS, and files that look like ours and are not."""
    from data_prep.shards import tfds_metadata

    records = [shard for shard in manifest.shards if shard.format == "array_record"]
    metadata = tfds_metadata(records, manifest.spec["record_tokens"]) if records else {}
    for name, expected in metadata.items():
        path = directory / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            yield f"{path}: missing; TFDS cannot open the dataset without it"
        except ValueError as error:
            yield f"{path}: not JSON: {error}"
        else:
            if found != expected:
                yield f"{path}: does not describe this dataset's ArrayRecord files"
    known = {shard.name for shard in manifest.shards} | metadata.keys() | {MANIFEST_NAME}
    for path in sorted(directory.iterdir()):
        ours = any(fnmatch.fnmatch(path.name, pattern) for pattern in OWN_FILES)
        if ours and path.name not in known:
            yield f"{path}: not in the manifest; left over from something else"


def main(argv: list[str] | None = None) -> int:
    """Prints the problems, or one line that there are none. Exit status 1 if there are."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.check", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset")
    args = parser.parse_args(argv)
    num_problems = 0
    try:
        for problem in find_problems(args.directory):
            print(problem)
            num_problems += 1
        manifest = load(args.directory)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if num_problems:
        print(
            f"{args.directory}: {num_problems} problem{'s' * (num_problems > 1)}. Delete it and "
            "prepare it again, or copy the named files from a good copy."
        )
        return 1
    sizes = ", ".join(f"{name} {split.num_tokens:,}" for name, split in manifest.splits.items())
    print(
        f"{args.directory}: OK, {len(manifest.shards)} files, {sizes} tokens, fingerprint "
        f"{manifest.fingerprint[:16]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
