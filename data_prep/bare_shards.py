"""Shards made elsewhere (llm.c, modded-nanogpt, or here without a manifest) -> what convert needs.

Such a .bin file says only what its ids are, so documents are found by their end-of-text tokens.
One may go on in the files that follow, and a stream may begin inside one: its first document then
has no end-of-text token. Files with `val` in their names are the validation split.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.cuts import StoredStream
from data_prep.engines.local import Report, Workers
from data_prep.inputs.paths import expand
from data_prep.options import Options, make_spec
from data_prep.pages.progress import Progress
from data_prep.parts import DOCUMENT_COLUMNS
from data_prep.pipeline import Outcome, confirm_complete, inspect_all
from data_prep.shards import CHUNK_TOKENS, Piece, write_documents
from data_prep.store.files import digest_of, whole_file
from data_prep.store.locations import InputError, file_name, is_remote
from data_prep.store.locations import download as download_file
from data_prep.store.manifest import DOCUMENTS, Manifest
from data_prep.store.token_bin import open_tokens, read_header
from data_prep.store.tokenizers import get_tokenizer
from data_prep.writing import run_to_the_end

PRESETS = {name: f"hf://datasets/kjj0/{name}/*.bin" for name in ("fineweb100B-gpt2", "fineweb10B-gpt2")}


def find_files(named: str, num_shards: int | None = None) -> dict[str, list[str]]:
    """The files of each split that has any, sorted by name; of train the first `num_shards`.

    Args:
      named: a preset, or comma-separated directories, files, globs and URLs of .bin files.

    Raises InputError: nothing there, nothing to train on, or fewer than `num_shards`.
    """
    pieces = [piece.strip() for piece in PRESETS.get(named, named).split(",")]
    patterns = ",".join(map(_pattern, pieces))
    paths = expand(patterns, (".bin",), " and ".join(PRESETS))
    paths.sort(key=lambda path: (file_name(path), path))
    val = [path for path in paths if "val" in file_name(path)]
    train = [path for path in paths if path not in set(val)]
    if not train:
        raise InputError(f"{named}: every file has 'val' in its name; none is left to train on")
    if num_shards is not None and num_shards > len(train):
        raise InputError(f"{named}: holds {len(train)} training shards, --num_shards={num_shards}")
    splits = {"train": train[:num_shards], "val": val}
    return {split: files for split, files in splits.items() if files}


def _pattern(piece: str) -> str:
    """A directory, here or elsewhere, means the .bin files in it."""
    remote = is_remote(piece) and "*" not in piece and not file_name(piece).endswith(".bin")
    if remote or os.path.isdir(piece):
        return f"{piece.rstrip('/')}/*.bin"
    return piece


class BareShards:
    """Shards without a manifest, as something to convert.

    Args:
      options: of the dataset that they become; `source` says where they are.
      num_shards: how many of the training shards; None is all.
    """

    def __init__(self, options: Options, num_shards: int | None):
        if num_shards is not None and num_shards < 1:
            raise ValueError(f"--num_shards={num_shards}: expected at least 1")
        self._options, self._num_shards = options, num_shards
        self._tokenizer = get_tokenizer(options.tokenizer)
        self._files: dict[str, list[str]] = {}
        self._entries: dict[str, dict[str, Any]] = {}  # what is known of each file, by path

    @property
    def num_tokens(self) -> int:
        """An estimate, from the sizes of the files."""
        return sum(entry["size"] or 0 for entry in self._entries.values()) // 2

    def confirm(self, output: Path) -> Outcome:
        """The complete dataset in `output`; ValueError where it is another one."""
        if is_remote(PRESETS.get(self._options.source, self._options.source)):
            return confirm_complete(output, self._spec(), None)
        try:
            return confirm_complete(output, self.spec(output))
        except InputError:  # the files may be gone by now
            return confirm_complete(output, self._spec(), None)

    def spec(self, output: Path) -> dict[str, Any]:
        """What the dataset in `output` is made from, and how.

        Raises ValueError: a file is not there, is no .bin file, or is in `output` itself.
        """
        self._files = find_files(self._options.source, self._num_shards)
        paths = [path for split in ("val", "train") for path in self._files.get(split, ())]
        for path in paths:
            if not is_remote(path):
                read_header(path)
                if os.path.realpath(os.path.dirname(path)) == os.path.realpath(output):
                    raise ValueError(f"{output}: holds the input {path}; write elsewhere")
        for path, inspection in zip(paths, inspect_all(paths, ""), strict=True):
            if inspection.error:
                raise InputError(inspection.error)
            self._entries[path] = inspection.identity
        return self._spec()

    def _spec(self) -> dict[str, Any]:
        spec = make_spec(self._options, self._tokenizer, list(self._entries.values()))
        # Nobody knows what the texts were cut from, and the files' names say what val is.
        unknown = {"text_column": None, "val_tokens": None}
        return spec | unknown | {"num_shards": self._num_shards}

    def read(self, work: Path, workers: Workers) -> tuple[dict[str, StoredStream], dict[str, StoredStream]]:
        """Of each split the tokens, and its documents: see `write_dataset`.

        Raises ValueError: files that cannot be downloaded, are damaged, or of another tokenizer.
        """
        local = self._download(work / "downloads", workers)
        headers = {path: read_header(local[path]) for path in self._entries}
        (work / "tables").mkdir(exist_ok=True)
        jobs: list[ScanJob] = []
        places: dict[str, list[int]] = {}  # of each split's jobs
        for split, files in self._files.items():
            files = [path for path in files if headers[path].num_tokens]
            if not files:
                raise InputError(f"{self._options.source}: the {split} files hold no tokens")
            places[split] = list(range(len(jobs), len(jobs) + len(files)))
            for index, path in enumerate(files):
                jobs.append(
                    ScanJob(
                        path,
                        tuple(local[later] for later in files[index:]),
                        is_first=index == 0,
                        tokenizer=self._options.tokenizer,
                        vocab_size=self._tokenizer.vocab_size,
                        end_of_text=self._tokenizer.end_of_text,
                        table=str(work / "tables" / f"{len(jobs):05d}.parquet"),
                    )
                )
        progress = Progress("read", sum(header.num_tokens for header in headers.values()))
        scans: list[Scan] = run_to_the_end(scan, jobs, workers, progress)
        for job, found in zip(jobs, scans, strict=True):
            self._entries[job.path] |= {"digest": found.tokens.digest}
        return (
            {split: StoredStream(scans[i].tokens for i in own) for split, own in places.items()},
            {split: StoredStream(scans[i].table for i in own) for split, own in places.items()},
        )

    def _download(self, directory: Path, workers: Workers) -> dict[str, str]:
        """Where each file is on this machine."""
        local = {
            path: str(directory / f"{index:05d}.bin") if is_remote(path) else path
            for index, path in enumerate(self._entries)
        }
        remote = [self._entries[path] for path in local if is_remote(path)]
        jobs = [DownloadJob(entry["path"], local[entry["path"]], entry["size"], entry["version"]) for entry in remote]
        if jobs:
            directory.mkdir(exist_ok=True)
            progress = Progress("download", sum(job.size for job in jobs))
            try:
                run_to_the_end(download, jobs, workers, progress)
            except ValueError as error:
                raise InputError(f"{error}\nWhat is complete is kept: run the same command again.") from error
        return local

    def finish(self, manifest: Manifest) -> Manifest:
        """The manifest with the digests of the files."""
        return replace(manifest, spec=manifest.spec | {"inputs": list(self._entries.values())})


@dataclass(frozen=True)
class DownloadJob:
    path: str
    target: str
    size: int  # in bytes
    version: str  # sha256 of the file where the Hub says it


def download(job: DownloadJob, report: Report) -> None:
    """Puts a remote .bin file at `target`, unless it is there already.

    Raises InputError: it does not arrive, or is not what was listed or no .bin file.
    """
    if not os.path.exists(job.target):
        with whole_file(job.target) as partial:
            download_file(job.path, partial, lambda num_bytes: report(0, 0, num_bytes, num_bytes))
            _check_download(job, partial)
    else:
        report(0, 0, 0, job.size)


def _check_download(job: DownloadJob, partial: Path) -> None:
    size = partial.stat().st_size
    if size != job.size:
        raise InputError(f"{job.path}: {size} bytes arrived, expected {job.size}")
    try:
        read_header(partial)
    except ValueError as error:
        raise InputError(str(error).replace(str(partial), job.path)) from error
    if len(job.version) == 64:
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != job.version:
            raise InputError(f"{job.path}: arrived with sha256 {found}, expected {job.version}")


@dataclass(frozen=True)
class ScanJob:
    path: str  # as the user named it
    files: tuple[str, ...]  # itself, and those that follow in the split: where they are here
    is_first: bool  # of the split
    tokenizer: str
    vocab_size: int
    end_of_text: int
    table: str  # what to write


@dataclass(frozen=True)
class Scan:
    """A file's tokens, and the table of the documents that begin there."""

    tokens: Piece
    table: Piece


def scan(job: ScanJob, report: Report) -> Scan:
    """Reads a file once: its digest, whether its ids are the tokenizer's, and its documents.

    `row` counts the documents that begin in the file. Raises InputError for ids out of range.
    """
    digest, num_tokens = digest_of(job.files[0]), 0
    starts = [np.empty(0, np.int64)]
    for chunk in _chunks(job.files[0]):
        if chunk.max() >= job.vocab_size:
            place = int(np.argmax(chunk >= job.vocab_size))
            raise InputError(
                f"{job.path}: token {num_tokens + place} is {chunk[place]}, but tokenizer "
                f"{job.tokenizer} has ids below {job.vocab_size}. Name the one that made the file "
                "by --tokenizer, or copy the file again."
            )
        starts.append(np.flatnonzero(chunk == job.end_of_text) + num_tokens)
        num_tokens += len(chunk)
        report(0, len(chunk), chunk.nbytes, len(chunk))
    starts_D = np.concatenate(starts)
    if job.is_first and starts_D[:1].tolist() != [0]:
        starts_D = np.insert(starts_D, 0, 0)  # begun in a file that nobody gave us
    end = num_tokens + (_tail(job) if len(starts_D) else 0)
    num_documents = len(starts_D)
    known = {
        "start": starts_D,
        "length": np.diff(starts_D, append=end),
        "source_file": pa.repeat(pa.scalar(job.path, pa.string()), num_documents),
        "row": np.arange(num_documents),
    }
    columns = [known.get(c.name, pa.nulls(num_documents, c.type)) for c in DOCUMENT_COLUMNS]
    write_documents(job.table, pa.table(columns, schema=DOCUMENT_COLUMNS))
    return Scan(
        Piece(job.files[0], "bin", digest, 0, num_tokens),
        Piece(job.table, DOCUMENTS, digest_of(job.table), 0, num_tokens),
    )


def _tail(job: ScanJob) -> int:
    """How many tokens of the files that follow belong to this one's last document."""
    num_tokens = 0
    for path in job.files[1:]:
        for chunk in _chunks(path):
            ends = np.flatnonzero(chunk == job.end_of_text)
            if len(ends):
                return num_tokens + int(ends[0])
            num_tokens += len(chunk)
    return num_tokens


def _chunks(path: str) -> Iterator[np.ndarray]:
    tokens = np.asarray(open_tokens(path))
    for start in range(0, len(tokens), CHUNK_TOKENS):
        yield tokens[start : start + CHUNK_TOKENS]
