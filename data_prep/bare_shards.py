"""Shards made elsewhere (llm.c, modded-nanogpt, or here without a manifest) -> what convert needs.

Such a .bin file says only what its ids are, so documents are found by their end-of-text tokens.
One may go on in the files that follow, and a stream may begin inside one: its first document then
has no end-of-text token. Files with `val` in their names are the validation split.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.agreement import confirm_complete
from data_prep.downloads import DownloadJob, download
from data_prep.engines.local import Workers
from data_prep.inputs.paths import expand
from data_prep.options import Options
from data_prep.outcome import Outcome
from data_prep.pages.progress import Progress
from data_prep.scanning import Scan, ScanJob, scan
from data_prep.store.datasets import splits_by_name
from data_prep.store.locations import InputError, file_name, is_remote
from data_prep.store.manifest import Manifest
from data_prep.store.secrets import public_names
from data_prep.store.spec import Spec
from data_prep.store.streams import StoredStream
from data_prep.store.token_bin import read_header
from data_prep.store.tokenizers import user_tokenizer
from data_prep.tokenizing import inspect_all
from data_prep.writing import run_to_the_end

PRESETS = {name: f"hf://datasets/kjj0/{name}/*.bin" for name in ("fineweb100B-gpt2", "fineweb10B-gpt2")}


def find_files(named: str, num_shards: int | None = None) -> dict[str, list[str]]:
    """The files of each split that has any, sorted by name; of train the first `num_shards`.

    Args:
      named: a preset, or comma-separated directories, files, globs and URLs of .bin files.

    Raises InputError: nothing there, nothing to train on, or fewer than `num_shards`.
    """
    pieces = [piece.strip() for piece in PRESETS.get(named, named).split(",")]
    patterns = ",".join(map(pattern_of, pieces))
    paths = expand(patterns, (".bin",), " and ".join(PRESETS))
    paths.sort(key=lambda path: (file_name(path), path))
    splits = splits_by_name(paths, public_names(named))
    train = splits["train"]
    if num_shards is not None and num_shards > len(train):
        raise InputError(f"{public_names(named)}: holds {len(train)} training shards, --num_shards={num_shards}")
    return splits | {"train": train[:num_shards]}


def pattern_of(piece: str) -> str:
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
        self._tokenizer = user_tokenizer(options.tokenizer)
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

    def spec(self, output: Path) -> Spec:
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

    def _spec(self) -> Spec:
        spec = self._options.spec(self._tokenizer, list(self._entries.values()))
        # Nobody knows what the texts were cut from, and the files' names say what val is.
        return replace(spec, text_column=None, val_tokens=None, num_shards=self._num_shards)

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
        jobs = [
            DownloadJob(
                path=entry["path"],
                target=local[entry["path"]],
                size=entry["size"],
                version=entry["version"],
            )
            for entry in remote
        ]
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
        return replace(manifest, spec=replace(manifest.spec, inputs=tuple(self._entries.values())))
