"""An opened dataset: what a run reads, prepared or a bare directory of .bin files."""

import glob
import hashlib
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.store import buckets, token_bin
from data_prep.store import manifest as manifest_lib
from data_prep.store.block_cache import BlockCache
from data_prep.store.block_source import open_blocks
from data_prep.store.dataset_files import default_cache
from data_prep.store.files import file_problem
from data_prep.store.locations import InputError, file_name
from data_prep.store.manifest import Shard
from data_prep.store.shard_numbers import gap_warning
from data_prep.store.spec import FORMATS
from data_prep.store.token_sources import BinSource, RecordSource, TokenSource

Format = Literal["auto", "bin", "array_record"]  # "auto" is the first of FORMATS that is there: .bin reads faster
Verify = Literal["auto", "size", "digest"]
_MOST_HEADERS_READ = 4096  # at the start: 0.1 s
_ALWAYS_VERIFY_BYTES = 2**30  # digests of this much take about a second
_GPT2_VOCAB_SIZE = 50257
_RESTORE = "Restore the file, or delete the directory and run data_prep.fineweb again."


@dataclass(frozen=True)
class UnverifiedShard:
    """A file of which the size was compared with the manifest and the digest was not.

    Attributes:
      start: of its first token in the split's stream.
    """

    path: str
    split: str
    start: int
    num_tokens: int
    num_bytes: int
    digest: str


@dataclass(frozen=True)
class TokenDataset:
    """An opened dataset.

    Attributes:
      fingerprint: equal for equal token streams (of a prepared dataset; see `data_prep.store.manifest`).
      splits: "train", and "val" where there is one.
      vocab_size: ids are below it.
      tokenizer: its name, or None where nobody recorded it.
      tokenizer_digest: equal digests promise equal ids; None as above.
      end_of_text: the id that begins each document.
      unigram_entropy: of the train split in nats, or None; the loss of a model that knows frequencies only.
      unverified: files that whoever reads them should verify meanwhile (see `gpt_pretrain.data.verification`): all or
        none, and none where the user asked for that.
    """

    directory: str
    format: str
    fingerprint: str
    splits: dict[str, TokenSource]
    vocab_size: int
    tokenizer: str | None
    tokenizer_digest: str | None
    end_of_text: int
    unigram_entropy: float | None
    unverified: tuple[UnverifiedShard, ...] = ()
    cache: BlockCache | None = None  # of one in a bucket

    @property
    def is_remote(self) -> bool:
        """It lies in a bucket: its blocks are fetched as they are needed, and verified as they arrive."""
        return self.cache is not None


def open_dataset(
    directory: str, *, format: Format = "auto", verify: Verify = "auto", cache: BlockCache | None = None
) -> TokenDataset:
    """Opens a prepared dataset, or a bare directory or glob of .bin shards made elsewhere.

    Args:
      directory: what `data_prep.fineweb --output_dir` was, or a directory or glob of .bin files; or a gs:// or s3://
        URL of a prepared dataset.
      format: which of the stored formats to read; they give the same windows.
      verify: sizes and counts are always checked against the manifest; "digest" also reads every byte,
        "auto" does so below 1 GiB and beyond leaves it to be done meanwhile (`TokenDataset.unverified`); "size" does
        so only of ArrayRecord files below 1 GiB. What comes from a bucket is verified as it comes, whatever this says.
      cache: for what comes from a bucket; None for the one in the user's cache folder.

    Raises:
      ValueError: no dataset there, a format that is not there, a shard that is not as the manifest says.
    """
    if format not in ("auto", *FORMATS):
        raise ValueError(f"data.format: found {format!r}, expected one of {['auto', *FORMATS]}")
    if verify not in ("auto", "size", "digest"):
        raise ValueError(f"data.verify: found {verify!r}, expected 'auto', 'size' or 'digest'")
    if buckets.is_bucket(directory):
        return _open_in_bucket(directory, format, cache or default_cache())
    here = Path(directory)
    if (here / manifest_lib.MANIFEST_NAME).exists() or (here / manifest_lib.WORK_DIR).exists():
        return _open_prepared(directory, format, verify)
    pattern = os.path.join(directory, "*.bin") if here.is_dir() else directory
    paths = sorted(glob.glob(pattern))
    if not paths and (arrays := sorted(glob.glob(os.path.join(directory, "*.npy")))):
        raise ValueError(
            f"{directory}: holds NumPy arrays ({os.path.basename(arrays[0])}), which are not trained on as they are. "
            f"`python -m data_prep.convert {shlex.quote(directory)} OUT` makes a prepared dataset of them."
        )
    if not paths:
        manifest_lib.load(directory)  # raises: says what a prepared dataset is and how to make one
    return _open_bare(directory, paths, format)


def _open_in_bucket(url: str, format: Format, cache: BlockCache) -> TokenDataset:
    if format == "array_record":
        raise ValueError(f"{url}: data.format='array_record' needs a directory of this machine; from a bucket, 'bin'")
    buckets.check_readable(url)
    manifest = manifest_lib.load(url)
    # Without .bin of the training split, the first says so.
    splits = {split: open_blocks(url, manifest, split, cache) for split in manifest.splits}
    return _dataset_of(url, "bin", manifest, splits, cache=cache)


def _open_prepared(directory, format, verify) -> TokenDataset:
    manifest = manifest_lib.load(directory)
    stored = [name for name in FORMATS if manifest.shards_of("train", name)]
    if not stored:
        raise ValueError(f"{directory}: its manifest names no file of tokens. Prepare the dataset again.")
    if format == "auto":
        format = stored[0]
    if format not in stored:
        raise ValueError(
            f"{directory}: data.format={format!r} is not stored here, only {stored}. Prepare it again with "
            f"--formats={','.join(FORMATS)}, or set data.format='auto'."
        )
    splits: dict[str, TokenSource] = {}
    unverified: list[UnverifiedShard] = []
    total_bytes = sum(shard.num_bytes for shard in manifest.shards if shard.format == format)
    is_small = total_bytes < _ALWAYS_VERIFY_BYTES
    # ArrayRecord's reader is C++ and ends the process on some damaged files: it gets none that could be looked at.
    digests = verify == "digest" or (is_small and (verify == "auto" or format == "array_record"))
    for split in manifest.splits:
        shards = manifest.shards_of(split, format)
        if not shards:
            continue
        paths = [os.path.join(directory, shard.name) for shard in shards]
        start = 0
        for path, shard in zip(paths, shards, strict=True):
            if problem := file_problem(path, shard.num_bytes, shard.digest, read=digests):
                raise ValueError(f"{problem}. {_RESTORE}")
            if verify == "auto" and not digests:
                unverified.append(UnverifiedShard(path, split, start, shard.num_tokens, shard.num_bytes, shard.digest))
            start += shard.num_tokens
        num_tokens = manifest.splits[split].num_tokens
        dtype = token_bin.token_dtype(manifest.spec.vocab_size)
        if format == "bin":
            splits[split] = _bin_source(directory, paths, shards, dtype)
        else:
            splits[split] = RecordSource(paths, manifest.spec.record_tokens, num_tokens, dtype)
        if splits[split].num_tokens != num_tokens:
            raise ValueError(
                f"{directory}: the {split} shards hold {splits[split].num_tokens} tokens, the manifest says "
                f"{num_tokens}. Run `python -m data_prep.check {shlex.quote(directory)}`."
            )
    return _dataset_of(directory, format, manifest, splits, unverified=tuple(unverified))


def _dataset_of(
    directory: str, format: str, manifest: manifest_lib.Manifest, splits: Mapping[str, TokenSource], **more: Any
) -> TokenDataset:
    return TokenDataset(
        directory=directory,
        format=format,
        fingerprint=manifest.fingerprint,
        splits=dict(splits),
        vocab_size=manifest.spec.vocab_size,
        tokenizer=manifest.spec.tokenizer,
        tokenizer_digest=manifest.spec.tokenizer_digest,
        end_of_text=manifest.spec.end_of_text,
        unigram_entropy=manifest.splits["train"].unigram_entropy,
        **more,
    )


def _bin_source(directory: str, paths: Sequence[str], shards: Sequence[Shard], dtype: np.dtype) -> BinSource:
    """Headers are compared with the manifest now; where there are very many, each when its shard is first read."""
    if len(shards) > _MOST_HEADERS_READ:
        counts = [(each.num_tokens, each.num_bytes - dtype.itemsize * each.num_tokens) for each in shards]
        return BinSource(paths, [token_bin.Header(*each, dtype) for each in counts])
    source = BinSource(paths)
    for path, shard, header in zip(paths, shards, source.headers, strict=True):
        if (header.num_tokens, header.dtype) != (shard.num_tokens, dtype):
            raise ValueError(
                f"{path}: holds {header.num_tokens} ids of {header.dtype.name}, the manifest says "
                f"{shard.num_tokens} of {dtype.name}. Run `python -m data_prep.check {shlex.quote(directory)}`."
            )
    return source


def _open_bare(directory: str, paths: Sequence[str], format: Format) -> TokenDataset:
    if format == "array_record":
        raise ValueError(f"{directory}: data.format='array_record' needs a prepared dataset with a manifest")
    named = splits_by_name(paths, directory)
    sources: dict[str, TokenSource] = {split: BinSource(files) for split, files in named.items()}
    if token_bin.read_header(named["train"][0]).dtype.itemsize > 2:
        raise ValueError(
            f"{directory}: uint32 ids without a manifest, so their vocabulary is not known. Convert them, naming their "
            f"tokenizer: `python -m data_prep.convert {shlex.quote(directory)} OUT --tokenizer=...`."
        )
    logging.getLogger(__name__).warning(
        "%s: no manifest, so only the headers and sizes of its %d .bin files can be checked: not their content, "
        "their completeness, or the tokenizer (taken to be GPT-2's).",
        directory,
        len(paths),
    )
    for gap in filter(None, (gap_warning(directory, files) for files in named.values())):
        logging.getLogger(__name__).warning("warning: %s; the stream goes on without them", gap)
    return TokenDataset(
        directory=directory,
        format="bin",
        fingerprint=_bare_fingerprint(paths),
        splits=sources,
        vocab_size=_GPT2_VOCAB_SIZE,
        tokenizer=None,
        tokenizer_digest=None,
        end_of_text=_GPT2_VOCAB_SIZE - 1,
        unigram_entropy=None,
    )


def splits_by_name(paths: Sequence[str], where: str) -> dict[str, list[str]]:
    """Shards without a manifest -> the files of each split that has any: those with `val` in their names, the others.

    >>> splits_by_name(["a_val_0.bin", "a_train_0.bin", "a_train_1.bin"], "a directory")
    {'train': ['a_train_0.bin', 'a_train_1.bin'], 'val': ['a_val_0.bin']}

    Args:
      paths: paths or URLs, in the order of the stream.
      where: what to call them in the error.

    Raises InputError: none is left to train on.
    """
    val = [path for path in paths if "val" in file_name(path)]
    train = [path for path in paths if "val" not in file_name(path)]
    if not train:
        raise InputError(f"{where}: every .bin file has 'val' in its name; none is left to train on")
    return {"train": train} | ({"val": val} if val else {})


def _bare_fingerprint(paths: Sequence[str]) -> str:
    """Names, sizes and the last 64 KiB of each file: enough to notice a changed directory, cheap for 100 GB."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            file.seek(max(0, size - 65536))
            digest.update(f"{os.path.basename(path)}/{size}/".encode() + file.read())
    return "bare-" + digest.hexdigest()
