"""Shards without a manifest (of llm.c, modded-nanogpt, build-nanogpt, nanoGPT, or ours) -> what convert needs.

Such a file says only what its ids are, so documents are found by their end-of-text tokens.
One may go on in the files that follow, and a stream may begin inside one: its first document then
has no end-of-text token. Files with `val` in their names are the validation split.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from data_prep.agreement import confirm_complete
from data_prep.downloads import DownloadJob, download
from data_prep.engines.engine import Engine
from data_prep.inputs.paths import Wanted, expand
from data_prep.inputs.patterns import at_home, split_names
from data_prep.options import Options
from data_prep.outcome import Outcome
from data_prep.pages.progress import Progress
from data_prep.scanning import Scan, ScanJob, scan
from data_prep.store.datasets import splits_by_name
from data_prep.store.locations import InputError, file_name, file_system_of, is_bucket, is_remote, readable_error
from data_prep.store.manifest import MANIFEST_NAME, Manifest
from data_prep.store.places import is_file, join, make_directory, same_place
from data_prep.store.secrets import public_names
from data_prep.store.shard_numbers import gap_warning
from data_prep.store.spec import Spec
from data_prep.store.streams import StoredStream
from data_prep.store.token_bin import Header, read_header
from data_prep.store.tokenizers import user_tokenizer
from data_prep.tokenizing import inspect_all
from data_prep.writing import run_to_the_end

PRESETS = {name: f"hf://datasets/kjj0/{name}/*.bin" for name in ("fineweb100B-gpt2", "fineweb10B-gpt2")}


def find_files(named: str, num_shards: int | None = None) -> dict[str, list[str]]:
    """The files of each split that has any, sorted by name; of train the first `num_shards`.

    Args:
      named: a preset, or comma-separated directories, files, globs and URLs of .bin or .npy files.

    Raises InputError: nothing there, nothing to train on, or fewer than `num_shards`.
    """
    paths = expand(PRESETS.get(named, named), SHARDS)
    paths.sort(key=lambda path: (file_name(path), path))
    splits = splits_by_name(paths, public_names(named))
    train = splits["train"]
    if num_shards is not None and num_shards > len(train):
        raise InputError(f"{public_names(named)}: holds {len(train)} training shards, --num_shards={num_shards}")
    return splits | {"train": train[:num_shards]}


def _shards_in(directory: str) -> list[str]:
    """The shards in a directory, here or elsewhere, and not below it; of one kind."""
    folder = directory.rstrip("/") or "/"
    if not is_remote(folder):
        names = sorted(os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith("."))
        return _of_one_kind(directory, [path for path in names if SHARDS.fits(path)])
    file_system, inner = file_system_of(folder)
    listed = [file_system.unstrip_protocol(path) for path in sorted(file_system.glob(f"{inner.rstrip('/')}/*"))]
    return _of_one_kind(directory, [path for path in listed if SHARDS.fits(path)])


def _of_one_kind(directory: str, paths: list[str]) -> list[str]:
    endings = sorted({file_name(path).rpartition(".")[2].lower() for path in paths})
    if not endings:
        raise InputError(f"{directory.rstrip('/')}/*.bin: no file matches, and there is no .npy file either")
    if len(endings) > 1:
        raise InputError(f"{directory}: holds both .bin and .npy files; name those that you mean, such as *.npy")
    return paths


def _is_shard(path: str) -> bool:
    return file_name(path).lower().endswith((".bin", ".npy"))


SHARDS = Wanted(_is_shard, ".bin or .npy", _shards_in, " and ".join(PRESETS), remote_folders=True)


def _refuse_prepared(folders: Iterable[str]) -> None:
    """InputError where one of the directories or URLs is a prepared dataset.

    Without its manifest, its ids would be taken for another tokenizer's and its documents be lost.
    """
    for folder in folders:
        if not _exists(f"{folder}/{MANIFEST_NAME}"):
            continue
        if is_remote(folder) and not is_bucket(folder):
            raise InputError(
                f"{folder}: is a prepared dataset ({MANIFEST_NAME} is there), which is converted from here or a bucket "
                "only. Copy the directory here, then convert the copy."
            )
        raise InputError(
            f"{folder}: is a prepared dataset ({MANIFEST_NAME} is there). Name this directory alone, which keeps its "
            "tokenizer and documents; or its .bin files and their --tokenizer, to find documents anew."
        )


def _exists(path: str) -> bool:
    if is_bucket(path):
        return is_file(path)
    try:
        file_system, inner = file_system_of(at_home(path))
        return bool(file_system.exists(inner))
    except Exception:  # what cannot be asked now fails soon, with a message of its own
        return False


class BareShards:
    """Shards without a manifest, as something to convert.

    Args:
      options: of the dataset that they become; `source` says where they are.
      num_shards: how many of the training shards; None is all.
      headerless: uint16 or uint32 where .bin files are ids of that kind and nothing else.
      guesses_tokenizer: nobody said which tokenizer made the ids.
    """

    def __init__(
        self,
        options: Options,
        num_shards: int | None,
        headerless: str | None = None,
        *,
        guesses_tokenizer: bool = False,
    ):
        if num_shards is not None and num_shards < 1:
            raise ValueError(f"--num_shards={num_shards}: expected at least 1")
        self._options, self._num_shards, self._headerless = options, num_shards, headerless
        self._guesses_tokenizer = guesses_tokenizer
        self._tokenizer = user_tokenizer(options.tokenizer)
        self._files: dict[str, list[str]] = {}
        self._entries: dict[str, dict[str, Any]] = {}  # what is known of each file, by path

    @property
    def num_tokens(self) -> int:
        """An estimate, from the sizes of the files."""
        return sum(entry["size"] or 0 for entry in self._entries.values()) // 2

    def confirm(self, output: str) -> Outcome:
        """The complete dataset in `output`; ValueError where it is another one."""
        if is_remote(PRESETS.get(self._options.source, self._options.source)):
            return confirm_complete(output, self._spec(), None)
        try:
            return confirm_complete(output, self.spec(output))
        except InputError:  # the files may be gone by now
            return confirm_complete(output, self._spec(), None)

    def spec(self, output: str) -> Spec:
        """What the dataset in `output` is made from, and how.

        Raises ValueError: a file is not there, is no .bin file, or is in `output` itself.
        """
        if (source := self._options.source) not in PRESETS:
            names = split_names(source, os.path.lexists)
            _refuse_prepared(name.rstrip("/") for name in names if "*" not in name and not _is_shard(name))
        self._files = find_files(source, self._num_shards)
        paths = [path for split in ("val", "train") for path in self._files.get(split, ())]
        if self._guesses_tokenizer and source not in PRESETS:
            _refuse_prepared(sorted({os.path.dirname(path) or "." for path in paths}))
        for warning in filter(None, (gap_warning(self._options.source, files) for files in self._files.values())):
            print(f"warning: {warning}; the stream goes on without them", file=sys.stderr)
        for path in paths:
            if not is_remote(path):
                self._header(path)
            if same_place(os.path.dirname(path), output):
                raise ValueError(f"{output}: holds the input {path}; write elsewhere")
        for path, inspection in zip(paths, inspect_all(paths, ""), strict=True):
            if inspection.error:
                raise inspection.error
            self._entries[path] = inspection.identity
        return self._spec()

    def _layout(self, path: str) -> str:
        """Of a file: see token_bin.LAYOUTS."""
        return "npy" if file_name(path).lower().endswith(".npy") else self._headerless or "bin"

    def _header(self, path: str) -> Header:
        try:
            return read_header(path, self._layout(path))
        except OSError as error:
            raise readable_error(path, error) from None

    def _spec(self) -> Spec:
        spec = self._options.spec(self._tokenizer, list(self._entries.values()))
        # Nobody knows what the texts were cut from, and the files' names say what val is.
        return replace(spec, text_column=None, val_tokens=None, num_shards=self._num_shards)

    def read(self, work: str, workers: Engine) -> tuple[dict[str, StoredStream], dict[str, StoredStream]]:
        """Of each split the tokens, and its documents: see `write_dataset`.

        Raises ValueError: files that cannot be downloaded, are damaged, or of another tokenizer.
        """
        local, headers = self._download(join(work, "downloads"), workers)
        headers |= {path: self._header(path) for path in self._entries if not is_remote(path)}
        make_directory(tables := join(work, "tables"))
        jobs: list[ScanJob] = []
        places: dict[str, list[int]] = {}  # of each split's jobs
        for split, files in self._files.items():
            files = [path for path in files if headers[path].num_tokens]
            if not files:
                raise InputError(f"{public_names(self._options.source)}: the {split} files hold no tokens")
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
                        table=join(tables, f"{len(jobs):05d}.parquet"),
                        layouts=tuple(self._layout(later) for later in files[index:]),
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

    def _download(self, directory: str, workers: Engine) -> tuple[dict[str, str], dict[str, Header]]:
        """Where each file is, here or beside what is written, and the headers of those that had to come."""
        local = {
            path: join(directory, f"{index:05d}.bin") if is_remote(path) else path
            for index, path in enumerate(self._entries)
        }
        remote = [self._entries[path] for path in local if is_remote(path)]
        jobs = [
            DownloadJob(
                path=entry["path"],
                target=local[entry["path"]],
                size=entry["size"],
                version=entry["version"],
                layout=self._layout(entry["path"]),
            )
            for entry in remote
        ]
        headers: dict[str, Header] = {}
        if jobs:
            make_directory(directory)
            progress = Progress("download", sum(job.size for job in jobs))
            try:
                found = run_to_the_end(download, jobs, workers, progress)
                headers = {job.path: header for job, header in zip(jobs, found, strict=True)}
            except ValueError as error:
                raise InputError(f"{error}\nWhat is complete is kept: run the same command again.") from error
        return local, headers

    def finish(self, manifest: Manifest) -> Manifest:
        """The manifest with the digests of the files."""
        return replace(manifest, spec=replace(manifest.spec, inputs=tuple(self._entries.values())))
