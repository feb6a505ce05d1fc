"""Token streams on disk: one interface, `read(starts, length)`, over .bin shards and ArrayRecord."""

import dataclasses
import glob
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike

from data_prep.store import manifest as manifest_lib
from data_prep.store import token_bin, token_records
from data_prep.store.files import digest_of

Format = Literal["auto", "bin", "array_record"]
Verify = Literal["auto", "size", "digest"]
_FORMATS = ("bin", "array_record")  # the first one present is what "auto" takes: .bin reads faster
_ALWAYS_VERIFY_BYTES = 2**30  # digests of this much take about a second
_GPT2_VOCAB_SIZE = 50257


class TokenSource(Protocol):
    """One split's token stream.

    One that lies on a disk may also have `fetch_ahead(starts, length)`: those tokens will be asked for soon.
    """

    num_tokens: int
    dtype: np.dtype  # of the ids: uint16 or uint32

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens `[start, start + length)` for each start: (n, length), uint16 or uint32 as they are stored."""
        ...


def num_windows(source: TokenSource, seq_len: int) -> int:
    """How many windows of `seq_len` inputs (and one more token) the stream holds; ValueError if none."""
    count = (source.num_tokens - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"data.seq_len={seq_len} needs {seq_len + 1} tokens for one window; the stream holds {source.num_tokens}"
        )
    return count


# A row of 1,024 takes 1 us from memory; from a fast disk 17 if it was asked for ahead, hundreds if not.
_SLOW_SECS_A_ROW = 8e-6


class BinSource:
    """The stream as .bin shards, memory-mapped: a read touches only the pages it needs."""

    def __init__(self, paths: Sequence[str | os.PathLike]):
        maps = [token_bin.open_tokens(path) for path in paths]
        # Plain arrays over the maps: slicing a np.memmap itself costs ten times as much.
        self._shards = [np.asarray(each) for each in maps]
        self._maps: list[tuple[Any, int]] = [(each.base, each.offset) for each in maps]
        self._waited = True  # for the disk, in the last read; the first one is likely to
        self._first = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.num_tokens = int(self._first[-1])
        self.dtype = self._shards[0].dtype
        for path, shard in zip(paths, self._shards, strict=True):
            if shard.dtype != self.dtype:
                raise ValueError(f"{path}: holds {shard.dtype.name} ids, but {paths[0]} holds {self.dtype.name}")

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        if not len(starts):
            return np.empty((0, length), self.dtype)
        starts = np.asarray(starts, np.int64)
        begin, end = _range_of(starts, length, self.num_tokens)
        started = time.perf_counter()
        if self._waited:
            self.fetch_ahead(starts, length)
        out = self._read(starts, length, begin, end)
        self._waited = time.perf_counter() - started > _SLOW_SECS_A_ROW * len(starts)
        return out

    def fetch_ahead(self, starts: np.ndarray, length: int) -> None:
        """Has the kernel fetch those tokens at once and nothing else, where it would fetch one after the other as they
        are touched, each with 128 KiB around it. Three times as fast from a disk; from memory a third slower."""
        for start in np.asarray(starts).tolist():
            stop = min(start + length, self.num_tokens)
            while start < stop:  # it may go on in the next shard
                shard = int(np.searchsorted(self._first, start, side="right")) - 1
                end = min(stop, int(self._first[shard + 1]))
                mapped, offset = self._maps[shard]
                first, last = (offset + (at - int(self._first[shard])) * self.dtype.itemsize for at in (start, end))
                page = first // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, last - page)
                start = end

    def _read(self, starts: np.ndarray, length: int, begin: int, end: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first, begin, side="right")) - 1
        if end <= self._first[shard + 1]:
            return _gather(self._shards[shard], starts - self._first[shard], length)  # all of one shard: half the time
        shards = np.searchsorted(self._first, starts, side="right") - 1
        begins = starts - self._first[shards]
        pieces = []
        for shard, begin in zip(shards.tolist(), begins.tolist(), strict=True):
            pieces.append(self._shards[shard][begin : begin + length])
            missing = length - len(pieces[-1])
            while missing:  # the window goes on in the next shard
                shard += 1
                pieces.append(self._shards[shard][:missing])
                missing -= len(pieces[-1])
        return np.concatenate(pieces).reshape(len(starts), length)


class RecordSource:
    """The stream as ArrayRecord: record `k` holds tokens `[k * record_tokens, (k + 1) * record_tokens)`."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        record_tokens: int,
        num_tokens: int,
        dtype: DTypeLike = np.uint16,
    ):
        self.dtype = np.dtype(dtype)
        self._records = token_records.open_records(paths, record_tokens, self.dtype)
        self._record_tokens = record_tokens
        self.num_tokens = num_tokens
        expected = -(-num_tokens // record_tokens)
        if len(self._records) != expected:
            raise ValueError(
                f"{os.path.dirname(os.fspath(paths[0]))}: found {len(self._records)} records, expected {expected} "
                f"for {num_tokens} tokens. Run `python -m data_prep.check` on the directory."
            )

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        if not len(starts):
            return np.empty((0, length), self.dtype)
        starts = np.asarray(starts, np.int64)
        _range_of(starts, length, self.num_tokens)
        first, offset = np.divmod(starts, self._record_tokens)
        last = (starts + length - 1) // self._record_tokens
        neighbours = np.arange((last - first).max() + 1)
        # Each record is fetched once for all windows. Neighbours stay neighbours when they are sorted, so a window
        # is contiguous in what was fetched, too.
        fetched = np.unique(np.minimum(first[:, None] + neighbours, last[:, None]))
        tokens = self._records.read(fetched).reshape(-1)
        return _gather(tokens, np.searchsorted(fetched, first) * self._record_tokens + offset, length)


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """An opened dataset.

    Attributes:
      fingerprint: equal for equal token streams (of a prepared dataset; see `data_prep.manifest`).
      splits: "train", and "val" where there is one.
      vocab_size: ids are below it.
      tokenizer: its name, or None where nobody recorded it.
      tokenizer_digest: equal digests promise equal ids; None as above.
      end_of_text: the id that begins each document.
      unigram_entropy: of the train split in nats, or None; the loss of a model that knows frequencies only.
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


def open_dataset(directory: str, *, format: Format = "auto", verify: Verify = "auto") -> TokenDataset:
    """Opens a prepared dataset, or a bare directory or glob of .bin shards made elsewhere.

    Args:
      directory: what `data_prep.fineweb --output_dir` was, or a directory or glob of .bin files.
      format: which of the stored formats to read; they give the same windows.
      verify: sizes and counts are always checked against the manifest; "digest" also reads every byte,
        "auto" does so below 1 GiB.

    Raises:
      ValueError: no dataset there, a format that is not there, a shard that is not as the manifest says.
    """
    if format not in ("auto", *_FORMATS):
        raise ValueError(f"data.format: found {format!r}, expected one of {['auto', *_FORMATS]}")
    if verify not in ("auto", "size", "digest"):
        raise ValueError(f"data.verify: found {verify!r}, expected 'auto', 'size' or 'digest'")
    here = Path(directory)
    if (here / manifest_lib.MANIFEST_NAME).exists() or (here / manifest_lib.WORK_DIR).exists():
        return _open_prepared(directory, format, verify)
    pattern = os.path.join(directory, "*.bin") if here.is_dir() else directory
    paths = sorted(glob.glob(pattern))
    if not paths:
        manifest_lib.load(directory)  # raises: says what a prepared dataset is and how to make one
    return _open_bare(directory, paths, format)


def _open_prepared(directory, format, verify) -> TokenDataset:
    manifest = manifest_lib.load(directory)
    stored = [name for name in _FORMATS if manifest.shards_of("train", name)]
    if format == "auto":
        format = stored[0]
    if format not in stored:
        raise ValueError(
            f"{directory}: data.format={format!r} is not stored here, only {stored}. Prepare it again with "
            f"--formats={','.join(_FORMATS)}, or set data.format='auto'."
        )
    splits: dict[str, TokenSource] = {}
    total_bytes = sum(shard.num_bytes for shard in manifest.shards if shard.format == format)
    digests = verify == "digest" or (verify == "auto" and total_bytes < _ALWAYS_VERIFY_BYTES)
    for split in manifest.splits:
        shards = manifest.shards_of(split, format)
        if not shards:
            continue
        paths = [os.path.join(directory, shard.name) for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            _verify(path, shard, digests)
        num_tokens = manifest.splits[split].num_tokens
        dtype = token_bin.token_dtype(manifest.spec["vocab_size"])
        if format == "bin":
            splits[split] = BinSource(paths)
        else:
            splits[split] = RecordSource(paths, manifest.spec["record_tokens"], num_tokens, dtype)
        if splits[split].num_tokens != num_tokens:
            raise ValueError(
                f"{directory}: the {split} shards hold {splits[split].num_tokens} tokens, the manifest says "
                f"{num_tokens}. Run `python -m data_prep.check {directory}`."
            )
    return TokenDataset(
        directory=directory,
        format=format,
        fingerprint=manifest.fingerprint,
        splits=splits,
        vocab_size=manifest.spec["vocab_size"],
        tokenizer=manifest.spec["tokenizer"],
        tokenizer_digest=manifest.spec["tokenizer_digest"],
        end_of_text=manifest.spec["end_of_text"],
        unigram_entropy=manifest.splits["train"].unigram_entropy,
    )


def _verify(path: str, shard: manifest_lib.Shard, digests: bool) -> None:
    advice = "Restore the file, or delete the directory and run data_prep.fineweb again."
    if not os.path.exists(path):
        raise ValueError(f"{path}: missing, but the manifest lists it. {advice}")
    if os.path.getsize(path) != shard.num_bytes:
        raise ValueError(f"{path}: holds {os.path.getsize(path)} bytes, the manifest says {shard.num_bytes}. {advice}")
    if digests and (found := digest_of(path)) != shard.digest:
        raise ValueError(f"{path}: digest is {found}, the manifest says {shard.digest}. {advice}")


def _open_bare(directory, paths, format) -> TokenDataset:
    if format == "array_record":
        raise ValueError(f"{directory}: data.format='array_record' needs a prepared dataset with a manifest")
    is_val = ["val" in os.path.basename(path) for path in paths]
    named = {
        "train": [path for path, val in zip(paths, is_val, strict=True) if not val],
        "val": [path for path, val in zip(paths, is_val, strict=True) if val],
    }
    if not named["train"]:
        raise ValueError(f"{directory}: every .bin file has 'val' in its name; none is left to train on")
    sources: dict[str, TokenSource] = {split: BinSource(files) for split, files in named.items() if files}
    if token_bin.read_header(named["train"][0]).dtype.itemsize > 2:
        raise ValueError(
            f"{directory}: uint32 ids without a manifest, so their vocabulary is not known. Convert them, naming their "
            f"tokenizer: `python -m data_prep.convert {directory} OUT --tokenizer=...`."
        )
    logging.getLogger(__name__).warning(
        "%s: no manifest, so only the headers and sizes of its %d .bin files can be checked: not their content, "
        "their completeness, or the tokenizer (taken to be GPT-2's).",
        directory,
        len(paths),
    )
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


def _bare_fingerprint(paths: Sequence[str]) -> str:
    """Names, sizes and the last 64 KiB of each file: enough to notice a changed directory, cheap for 100 GB."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            file.seek(max(0, size - 65536))
            digest.update(f"{os.path.basename(path)}/{size}/".encode() + file.read())
    return "bare-" + digest.hexdigest()


def _gather(tokens: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
    """Rows `tokens[begin : begin + length]`, by one fancy index into a view of all windows."""
    size = tokens.itemsize
    windows_WT = np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens, strides=(size, size))
    return windows_WT[begins]


def _range_of(starts: np.ndarray, length: int, num_tokens: int) -> tuple[int, int]:
    """[first token, end) of what is asked for. IndexError unless the stream has it."""
    begin, end = int(starts.min()), int(starts.max()) + length
    if begin < 0 or end > num_tokens:
        raise IndexError(f"tokens [{begin}, {end}) asked of a stream of {num_tokens}")
    return begin, end
