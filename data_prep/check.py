"""Verifies a prepared dataset: `python -m data_prep.check DIR`.

Every size and digest, every count, the tables of documents against the stream, and the
fingerprint, computed anew from each stored format. One line for each problem; exit status 1.
`--repair` makes the damaged files again, from the other format or from the inputs.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_prep.cuts import dataset_stream
from data_prep.engines.local import Report, Workers, all_cores
from data_prep.pages.progress import Progress
from data_prep.shards import Piece, count_ids, num_ids, read_pieces, tfds_metadata
from data_prep.store.document_index import index_table
from data_prep.store.files import digest_of
from data_prep.store.fingerprints import BLOCK_TOKENS, block_digests, fingerprint
from data_prep.store.manifest import (
    DOCUMENTS,
    FORMATS,
    INDEX,
    MANIFEST_NAME,
    Manifest,
    Shard,
    dataset_fingerprint,
    load,
    unigram_entropy,
)
from data_prep.store.token_bin import token_dtype

OWN_FILES = ("fineweb_*", "fineweb-*", "documents_*", ".*", "dataset_info.json", "features.json")


@dataclass(frozen=True)
class FileCheck:
    """One file, and what it should hold."""

    directory: str
    shard: Shard
    start: int  # of its range in the split's stream
    # Of token files: from the first fingerprint block that begins in the range to the end of the
    # last; so that reading them finds the file in the page cache, right after its digest.
    blocks_start: int
    pieces: tuple[Piece, ...]
    tables: tuple[tuple[str, int], ...]  # (name, start of its range) of the split's tables
    vocab_size: int
    record_tokens: int
    end_of_text: int


@dataclass
class Finding:
    """What a look at one file found."""

    problem: str = ""  # the file itself is not what was written
    contradictions: list[str] = field(default_factory=list)  # it is, and still cannot be right
    blocks: list[bytes] = field(default_factory=list)
    counts_V: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    first: int = 0  # of a table: start of its first document, and the end of its last
    end: int = 0


def check_file(job: FileCheck, report: Report) -> Finding:
    """Compares one file with what the manifest says of it."""
    path = Path(job.directory, job.shard.name)
    finding = Finding(_file_problem(path, job.shard))
    if not finding.problem:
        try:
            if job.shard.format in FORMATS:
                _check_tokens(job, finding)
            elif job.shard.format == DOCUMENTS:
                _check_table(path, job, finding)
            else:
                _check_index(path, job, finding)
        except (ValueError, OSError) as error:  # it was bad already when it was written
            finding.contradictions.append(f"{path}: {error}")
    report(0, job.shard.num_tokens, job.shard.num_bytes, job.shard.num_bytes)
    return finding


def _file_problem(path: Path, shard: Shard) -> str:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != shard.num_bytes:
        return f"{size} bytes, expected {shard.num_bytes}; it was cut short or written to"
    digest = digest_of(path)
    if digest != shard.digest:
        return f"digest {digest}, expected {shard.digest}; its content was changed"
    return ""


def _check_tokens(job: FileCheck, finding: Finding) -> None:
    """Blocks and counts of the stretch, and end-of-text against the tables of documents."""
    finding.counts_V = np.zeros(num_ids(job.vocab_size), np.int64)
    ends = [np.empty(0, np.int64)]
    position = job.blocks_start

    def seen() -> Iterator[np.ndarray]:
        nonlocal position
        for chunk in read_pieces(job.pieces, job.record_tokens, token_dtype(job.vocab_size)):
            finding.counts_V += count_ids(chunk, job.vocab_size)
            ends.append(np.flatnonzero(chunk == job.end_of_text) + position)
            position += len(chunk)
            yield chunk

    finding.blocks = list(block_digests(seen()))
    found = np.concatenate(ends)
    expected = _document_starts(job, position)
    if expected is None:
        return
    if job.blocks_start == 0 and found[:1].tolist() != [0]:
        found = np.concatenate([[0], found])  # a stream that begins inside a document
    if not np.array_equal(found, expected):
        finding.contradictions.append(
            f"{job.directory}: split {job.shard.split} as {job.shard.format}, tokens "
            f"[{job.blocks_start}, {position}): end-of-text is not exactly where the documents "
            "tables say"
        )


def _document_starts(job: FileCheck, stop: int) -> np.ndarray | None:
    """Starts of the documents in the job's blocks, by the tables; None where they are damaged."""
    starts = [np.empty(0, np.int64)]
    for (name, first), (_, last) in zip(job.tables, [*job.tables[1:], ("", stop)], strict=True):
        if first < stop and last > job.blocks_start:
            try:
                table = pq.ParquetFile(Path(job.directory, name)).read(["start"])
            except (ValueError, OSError):
                return None
            starts.append(table["start"].to_numpy())
    all_starts = np.concatenate(starts)
    return all_starts[(all_starts >= job.blocks_start) & (all_starts < stop)]


def _check_table(path: Path, job: FileCheck, finding: Finding) -> None:
    """Whether the documents follow one another without gap, and start in the table's range."""
    table = pq.ParquetFile(path).read(columns=["start", "length"])
    starts_D, lengths_D = (table[name].to_numpy() for name in ("start", "length"))
    say = finding.contradictions.append
    if len(starts_D) != job.shard.num_rows:
        say(f"{path}: {len(starts_D)} documents, the manifest says {job.shard.num_rows}")
    if not len(starts_D):
        finding.first = finding.end = -1
        return
    wrong = np.flatnonzero(starts_D[1:] != starts_D[:-1] + lengths_D[:-1])
    if len(wrong):
        row = int(wrong[0]) + 1
        expected = starts_D[row - 1] + lengths_D[row - 1]
        say(f"{path}: row {row} starts at {starts_D[row]}, expected {expected}")
    stop = job.start + job.shard.num_tokens
    if starts_D[0] < job.start or starts_D[-1] >= stop:
        say(f"{path}: lists documents that start outside [{job.start}, {stop})")
    finding.first, finding.end = int(starts_D[0]), int(starts_D[-1] + lengths_D[-1])


def _check_index(path: Path, job: FileCheck, finding: Finding) -> None:
    name = next(name for name, start in job.tables if start == job.start)
    try:
        table = pq.ParquetFile(path.parent / name).read(columns=["id", "url"])
    except (ValueError, OSError):
        return  # the table's own check says it
    if not np.array_equal(np.fromfile(path, "<u8"), index_table(table)):
        finding.contradictions.append(f"{path}: is not the index of {name}")


def file_checks(directory: Path, manifest: Manifest) -> list[FileCheck]:
    """A job for each file that the manifest names."""
    spec, jobs = manifest.spec, []
    for split in manifest.splits:
        tables = manifest.shards_of(split, DOCUMENTS)
        starts = accumulate((shard.num_tokens for shard in tables), initial=0)
        named = tuple((shard.name, start) for shard, start in zip(tables, starts, strict=False))
        for format in (*spec["formats"], DOCUMENTS, INDEX):
            stream = dataset_stream(directory, manifest, split, format)
            start = 0
            for shard in manifest.shards_of(split, format):
                stop = start + shard.num_tokens
                first, last = (-(-edge // BLOCK_TOKENS) * BLOCK_TOKENS for edge in (start, stop))
                last = min(last, stream.num_tokens)
                pieces = stream.pieces(first, last) if format in FORMATS and first < last else ()
                options = spec["vocab_size"], spec["record_tokens"], spec["end_of_text"]
                place = str(directory), shard, start, first
                jobs.append(FileCheck(*place, pieces, named, *options))
                start = stop
    return jobs


def find_problems(
    directory: str | Path,
    num_workers: int = 1,
    damaged: Callable[[Shard], None] = lambda shard: None,
) -> Iterator[str]:
    """A sentence for each thing that is wrong, starting with the file's path.

    Args:
      damaged: is told of each file that is not what was written.

    Raises ValueError when there is no manifest to compare with, or it was altered.
    """
    directory = Path(directory)
    manifest = load(directory)
    jobs = file_checks(directory, manifest)
    progress = Progress("check", sum(shard.num_bytes for shard in manifest.shards))
    findings: dict[str, Finding] = {}
    with Workers(num_workers) as workers:
        for job, result in workers.run(check_file, jobs, progress):
            if isinstance(result, Exception):
                raise result
            findings[job.shard.name] = result
    progress.close()
    by_digest = {shard.digest: shard.name for shard in manifest.shards}
    for shard in manifest.shards:
        if problem := findings[shard.name].problem:
            damaged(shard)
            other = by_digest.get(problem.split(",")[0].removeprefix("digest "))
            yield f"{directory / shard.name}: {problem}" + (f" to {other}'s" if other else "")
    yield from _check_manifest(directory / MANIFEST_NAME, manifest)
    for name in manifest.splits:
        for format in (DOCUMENTS, INDEX, *manifest.spec["formats"]):
            found = [findings[shard.name] for shard in manifest.shards_of(name, format)]
            whole = bool(found) and not any(finding.problem for finding in found)
            for finding in found:
                # A token file is read on into the next one, whose damage was said already.
                if whole or format not in FORMATS:
                    yield from finding.contradictions
            if whole and format == DOCUMENTS:
                yield from _check_documents(directory, manifest, name, found)
            elif whole and format in FORMATS:
                yield from _check_stream(directory, manifest, name, format, found)
    yield from _check_other_files(directory, manifest)


def _check_manifest(path: Path, manifest: Manifest) -> Iterator[str]:
    """The manifest against itself."""
    found = dataset_fingerprint(manifest.splits, manifest.spec["tokenizer_digest"])
    if found != manifest.fingerprint:
        yield f"{path}: fingerprint {manifest.fingerprint}, but its splits give {found}"
    for name, split in manifest.splits.items():
        for format in (*manifest.spec["formats"], DOCUMENTS, INDEX):
            found = sum(shard.num_tokens for shard in manifest.shards_of(name, format))
            if found != split.num_tokens:
                yield (f"{path}: split {name} has {split.num_tokens} tokens, but its {format} files have {found}")


def _check_documents(directory: Path, manifest: Manifest, name: str, found: Sequence[Finding]) -> Iterator[str]:
    """The tables of a split one after the other."""
    split, position = manifest.splits[name], 0
    for shard, finding in zip(manifest.shards_of(name, DOCUMENTS), found, strict=True):
        if finding.end < 0:  # no document starts here
            continue
        if finding.first != position:
            yield (f"{directory / shard.name}: row 0 starts at {finding.first}, expected {position}")
        position = finding.end
    where = directory / DOCUMENTS
    if position != split.num_tokens:
        yield f"{where}_*: documents end at token {position}, the split at {split.num_tokens}"
    num_rows = sum(shard.num_rows for shard in manifest.shards_of(name, DOCUMENTS))
    if num_rows != split.num_documents:
        yield f"{where}_*: {num_rows} documents, the manifest says {split.num_documents}"


def _check_stream(
    directory: Path, manifest: Manifest, name: str, format: str, found: Sequence[Finding]
) -> Iterator[str]:
    """A split in one format as a whole."""
    split, where = manifest.splits[name], f"{directory}: split {name} as {format}"
    digest = fingerprint([block for finding in found for block in finding.blocks])
    if digest != split.fingerprint:
        yield f"{where}: fingerprint {digest}, expected {split.fingerprint}"
    counts_V = sum((finding.counts_V for finding in found), np.zeros((), np.int64))
    entropy = unigram_entropy(counts_V)
    if abs(entropy - split.unigram_entropy) > 1e-6:
        yield f"{where}: unigram entropy {entropy}, the manifest says {split.unigram_entropy}"
    vocab_size = manifest.spec["vocab_size"]
    if counts_V[vocab_size:].any():
        yield f"{where}: holds ids that the tokenizer does not have ({vocab_size} and more)"


def _check_other_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The files for TFDS, and files that look like ours and are not."""
    records = [shard for shard in manifest.shards if shard.format == "array_record"]
    options = manifest.spec["record_tokens"], manifest.spec["vocab_size"]
    metadata = tfds_metadata(records, *options) if records else {}
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


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.check",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset")
    parser.add_argument("--num_workers", type=int, default=all_cores(), help="default: all cores")
    parser.add_argument("--repair", action="store_true", help="make damaged files again")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the problems, or one line that there are none. Exit status 1 if any is left."""
    args = make_parser().parse_args(argv)
    try:
        damaged: list[Shard] = []
        look = partial(find_problems, args.directory, args.num_workers)
        problems = list(_printed(look(damaged.append)))
        if problems and args.repair:
            from data_prep.repair import repair

            for sentence in repair(args.directory, damaged, args.num_workers):
                print(sentence)
            print("checking again")
            problems = list(_printed(look()))
        manifest = load(args.directory)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if problems:
        advice = "" if args.repair else " `--repair` makes damaged files again."
        plural = "s" * (len(problems) > 1)
        print(f"{args.directory}: {len(problems)} problem{plural}.{advice}")
        return 1
    sizes = ", ".join(f"{name} {split.num_tokens:,}" for name, split in manifest.splits.items())
    print(
        f"{args.directory}: OK, {len(manifest.shards)} files, {sizes} tokens, fingerprint {manifest.fingerprint[:16]}"
    )
    return 0


def _printed(problems: Iterator[str]) -> Iterator[str]:
    for problem in problems:
        print(problem)
        yield problem


if __name__ == "__main__":
    sys.exit(main())
