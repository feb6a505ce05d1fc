"""A split's token stream in a bucket, read block by block through a cache on this machine."""

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.store import buckets
from data_prep.store.addresses import Addresses, EqualPieces, Stretch
from data_prep.store.block_cache import BlockCache
from data_prep.store.blocks_file import Digests, file_bytes, find_blocks, num_blocks
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.manifest import Manifest, Shard, Split
from data_prep.store.names import blocks_name
from data_prep.store.open_files import OPEN_FILES
from data_prep.store.token_bin import HEADER_BYTES, MappedTokens, token_dtype
from data_prep.store.token_sources import MappedSource, zeros_as_touched

_HEAD_TOKENS = 16  # of each block that was here once: a window's last token is often the next block's first
_MOST_AT_ONCE = 64  # blocks
_MOST_BROUGHT = 1 << 18
# Of a longer stream (2 T tokens) the blocks file is not fetched whole, which would be more than 64 MiB, but in pages.
MOST_BLOCKS_WHOLE = 1 << 21
PAGE_BYTES, _MOST_PAGES = 1 << 14, 1 << 12  # more than there are blocks in the look-ahead, each on a page of its own
_LOCAL_PAGE_BYTES, _MOST_LOCAL_BYTES = 1 << 12, 1 << 20  # of a file in the cache; a shorter one is one page
_AT_ONCE_BYTES = 1 << 24  # of a blocks file, in one request


class BlockSource(MappedSource):
    """The stream as blocks of 2**20 tokens: what is not in the cache is fetched from the .bin files in the bucket.

    Nothing of a file is touched before a block of it is needed: sizes and counts are the manifest's, and the digest of
    each block that arrives is compared with the one in the blocks file.

    Args:
      url: of the dataset.
      shards: the .bin files of the split, in order.
      digests: of the blocks.
    """

    def __init__(self, url: str, shards: Sequence[Shard], digests: Digests, dtype: np.dtype, cache: BlockCache):
        self._shards = Addresses(shard.num_tokens for shard in shards)
        super().__init__(EqualPieces(self._shards.total, BLOCK_TOKENS), dtype)
        self.digests, count = digests, len(digests)
        assert count == len(self._addresses), (count, self.num_tokens)
        self._url, self._files, self.cache = url, shards, cache
        self.brought: dict[str, int] = {}  # by digest: what this process had the cache hold, and it did not remove
        self._digest_of: dict[int, str] = {}  # of the blocks that are open
        self._blocks_of: dict[str, list[int]] = {}  # of these: blocks may be equal
        self._lock = threading.Lock()  # over both
        self._heads = zeros_as_touched((count, _HEAD_TOKENS), dtype)
        self._has_head = zeros_as_touched((count,), np.dtype(bool))
        self._is_open = zeros_as_touched((count,), np.dtype(bool))  # as `_tokens` says it, for many blocks at once
        at_once = cache.max_bytes // (4 * BLOCK_TOKENS * dtype.itemsize)
        self._at_once = max(1, min(_MOST_AT_ONCE, at_once))  # what is fetched for one read must not push itself out
        cache.add_user(self)

    @property
    def num_bytes(self) -> int:
        """Of all blocks."""
        return self.num_tokens * self.dtype.itemsize

    def block_bytes(self, block: int) -> int:
        first, last = self._addresses.edges(block)
        return (last - first) * self.dtype.itemsize

    def needed(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The blocks without which `read(starts, length)` cannot be, in the order of the starts: int64 (n,).

        Not those of which a window needs a few tokens only that are known.
        """
        whole, heads = self.needed_at(starts, length)
        return np.concatenate([whole[0], np.setdiff1d(heads[0], whole[0])])

    def needed_at(self, starts: np.ndarray, length: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Twice (blocks, the number of the first start that needs each), both int64 (n,) in the order of the starts:
        those that must be there to be read, and those of which only the first tokens are needed and not known yet."""
        starts = np.asarray(starts, np.int64)
        first, last = starts // BLOCK_TOKENS, (starts + length - 1) // BLOCK_TOKENS
        is_head = (last > first) & (starts + length - last * BLOCK_TOKENS <= _HEAD_TOKENS)
        rows = np.flatnonzero(is_head & ~self._has_head[last])
        heads = _first_uses(last[rows])
        last = last - is_head
        most = int((last - first).max(initial=0))
        blocks, places = _first_uses(np.minimum(first[:, None] + np.arange(most + 1), last[:, None]).reshape(-1))
        return (blocks, places // (most + 1)), (heads[0], rows[heads[1]])

    def blocks_with(self, digests: Sequence[str]) -> dict[str, int]:
        """Which block has each of these digests, of those that are known and found in this stream.

        The whole blocks file is looked through if it is in the cache. Nothing is fetched.
        """
        name = self.digests.verified_as
        return find_blocks(self.cache.path("files", name), digests) if name and digests else {}

    def has_head(self, block: int) -> bool:
        """Whether its first tokens are known."""
        return bool(self._has_head[block])

    def is_here(self, block: int) -> bool:
        """Whether the cache has it."""
        return self.cache.has("blocks", self.digests[block])

    def bring(self, block: int) -> Path:
        """Has the cache hold a block. ValueError where it cannot be fetched, or arrives wrong again and again."""
        try:
            path = self._bring(block)
        except buckets.BucketError:
            raise
        except ValueError:
            if not self.digests.changed(block):
                raise
            path = self._bring(block)
        if len(self.brought) >= _MOST_BROUGHT:  # others may have removed them
            self.brought.clear()
        self.brought[path.name] = block
        if not self._has_head[block]:
            with contextlib.suppress(OSError):  # removed already
                head = np.fromfile(path, self.dtype, _HEAD_TOKENS)
                self._heads[block, : len(head)] = head
                self._has_head[block] = True
        return path

    def _bring(self, block: int) -> Path:
        def fill(partial: Path) -> None:
            with open(partial, "wb") as file:
                for shard, first, last in self._stretches(block):
                    file.write(self._fetch(self._files[shard], first, last))

        number = self._stretches(block)[0].file
        advice = "Upload the dataset again from a copy that `python -m data_prep.check` finds good."
        return self.cache.get(
            "blocks",
            self.digests[block],
            self.block_bytes(block),
            fill,
            what=f"{buckets.join(self._url, self._files[number].name)}: block {block} of the stream",
            advice=advice if self.digests.verified_as else f"Either it or its digest in blocks-*.b3 is wrong. {advice}",
        )

    def damage(self, starts: np.ndarray, length: int) -> list[str]:
        """A sentence for each block of these windows that was changed in the cache since it came; it is removed."""
        found = []
        for block in self.needed(starts, length).tolist():
            if problem := self.cache.problem("blocks", self.digests[block], self.block_bytes(block)):
                self.cache.drop("blocks", self.digests[block])
                found.append(
                    f"{problem.path}: was changed on this disk ({problem.reason}). It was removed, and is fetched "
                    "again by the same command."
                )
        return found

    def fetch_ahead(self, starts: np.ndarray, length: int) -> None:
        """As `MappedSource`, of what is in the cache: from the bucket it comes by `bring`."""
        starts = np.asarray(starts, np.int64)
        starts = starts[starts < self.num_tokens]
        edges = np.stack([starts, np.minimum(starts + length, self.num_tokens) - 1]) // BLOCK_TOKENS
        is_here = self._is_open[edges]
        blocks, places = np.unique(edges[~is_here], return_inverse=True)
        self.digests.read_ahead(blocks.tolist(), self.cache.threads)
        is_here[~is_here] = np.array([self.is_here(block) for block in blocks.tolist()], bool)[places]
        super().fetch_ahead(starts[is_here.all(0) & (edges[1] - edges[0] < 2)], length)

    def let_go(self, number: int) -> None:
        """See `open_files.HoldsFiles`."""
        self._is_open[number] = False
        with self._lock:
            if digest := self._digest_of.pop(number, None):
                self._blocks_of[digest].remove(number)
                if not self._blocks_of[digest]:
                    del self._blocks_of[digest]
        super().let_go(number)

    def forget(self, digest: str) -> None:
        """See `block_cache.Forgets`."""
        self.brought.pop(digest, None)
        with self._lock:
            blocks = self._blocks_of.get(digest, []).copy()
        for block in blocks:
            self.let_go(block)

    def forget_removed(self) -> None:
        """Closes what another process has removed from the cache: open, it would stay on the disk."""
        for digest in list(self._blocks_of):
            if not self.cache.has("blocks", digest):
                self.forget(digest)

    def _stretches(self, block: int) -> list[Stretch]:
        """What holds a block: a file, or two and more."""
        return list(self._shards.stretches(*self._addresses.edges(block)))

    def _fetch(self, shard: Shard, first: int, last: int) -> bytes:
        """Tokens [first, last) of a file."""
        size = self.dtype.itemsize
        header = shard.num_bytes - shard.num_tokens * size
        return buckets.read(buckets.join(self._url, shard.name), header + first * size, (last - first) * size)

    def _map(self, shard: int) -> MappedTokens:
        for _ in range(10):  # another process may need the room just now
            path = self.bring(shard)
            try:
                opened = OPEN_FILES.open(os.fspath(path), shard, self, self._opened)
            except FileNotFoundError:
                continue
            if opened.map.size() == len(opened.map) == self.block_bytes(shard):
                break
        else:
            raise ValueError(
                f"{self.cache.folder}: what is fetched is removed before it is read, as others need the room. Raise "
                "data.cache_bytes."
            )
        with self._lock:
            if shard not in self._digest_of:
                self._digest_of[shard] = path.name
                self._blocks_of.setdefault(path.name, []).append(shard)
        self._mapped[shard], self._tokens[shard] = opened, opened.tokens
        self._is_open[shard] = True
        return opened

    def _opened(self, path: str) -> MappedTokens:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return MappedTokens(np.frombuffer(mapped, self.dtype, len(mapped) // self.dtype.itemsize), mapped, 0)

    def _look_at(self, shard: int, now: float) -> None:
        """A file that was cut short is fetched again."""
        _, mapped, _ = self._mapped.get(shard) or self._map(shard)
        if mapped.size() < len(mapped):
            self.let_go(shard)
            self._map(shard)
        self._looked_secs[shard] = now

    def _read(self, starts: np.ndarray, length: int, begin: int, end: int, now: float) -> np.ndarray:
        if self._is_open[starts // BLOCK_TOKENS].all() or np.sum(~self._is_open[self.needed(starts, length)]) < 2:
            return super()._read(starts, length, begin, end, now)
        # A few blocks after the other, of each all rows: several are fetched at once, and none twice.
        out = np.empty((len(starts), length), self.dtype)
        by_place = np.argsort(starts, kind="stable")
        groups = np.unique(starts[by_place] // BLOCK_TOKENS, return_inverse=True)[1] // self._at_once
        for rows in np.split(by_place, np.flatnonzero(np.diff(groups)) + 1):
            blocks = self.needed(starts[rows], length).tolist()
            held = list(self.cache.threads.map(self._tokens_of, blocks))  # open until the rows are copied
            first, last = int(starts[rows].min()), int(starts[rows].max()) + length
            out[rows] = super()._read(starts[rows], length, first, last, now)
            del held
        return out

    def _across(self, start: int, length: int, now: float) -> np.ndarray:
        *others, (block, _, over) = self._addresses.stretches(start, start + length)
        if not others or over > _HEAD_TOKENS or not self._has_head[block]:
            return super()._across(start, length, now)
        return np.concatenate([super()._across(start, length - over, now), self._heads[block, :over]])


def _first_uses(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[7, 3, 7] -> each number once, in this order, and where it is first: [7, 3], [0, 1]."""
    found, places = np.unique(blocks, return_index=True)
    in_order = np.argsort(places, kind="stable")
    return found[in_order], places[in_order]


def open_blocks(url: str, manifest: Manifest, split: str, cache: BlockCache) -> BlockSource:
    """The stream of one split of a prepared dataset in a bucket. Fetches the split's blocks file and nothing else; of
    a stream of more than MOST_BLOCKS_WHOLE blocks, its size only.

    Raises ValueError: there is no blocks file or no .bin, or what the manifest says of them cannot be.
    """
    there, shards = manifest.splits[split], manifest.shards_of(split, "bin")
    dtype = token_dtype(manifest.spec.vocab_size)
    if not shards:
        raise ValueError(
            f"{url}: stores {' and '.join(manifest.spec.formats)}; from a bucket .bin is trained on. On a copy on this "
            "machine, `python -m data_prep.convert COPY OUT --formats=bin` makes a dataset to upload."
        )
    for shard in shards:
        if shard.num_bytes - shard.num_tokens * dtype.itemsize not in HEADER_BYTES.values():
            raise ValueError(
                f"{buckets.join(url, shard.name)}: {shard.num_bytes} bytes cannot hold {shard.num_tokens} ids of "
                f"{dtype.name} and a header, as the manifest says. Prepare the dataset again."
            )
    if (found := sum(shard.num_tokens for shard in shards)) != there.num_tokens:
        raise ValueError(
            f"{url}: the {split} shards hold {found} tokens, the manifest says {there.num_tokens}. Prepare the dataset "
            "again."
        )
    digests = _digests_of(buckets.join(url, blocks_name(split)), there, cache)
    return BlockSource(url, shards, digests, dtype, cache)


def _digests_of(name: str, split: Split, cache: BlockCache) -> Digests:
    """What the blocks file at the URL `name` says."""
    count, num_bytes = num_blocks(split.num_tokens), file_bytes(split)
    advice = (
        "On a copy of the dataset on this machine, `python -m data_prep.check COPY --repair` writes it; upload it "
        "beside the others."
    )

    def stat() -> buckets.Object:
        if (found := buckets.stat(name)) is None:
            raise ValueError(f"{name}: no such object; without the digests in it, nothing is trained on. {advice}")
        return found

    def wrong_size(found: int, expected: int) -> ValueError:
        return ValueError(f"{name}: holds {found} bytes, expected {expected}. {advice}")

    def fill(partial: Path) -> None:
        try:
            if num_bytes > _AT_ONCE_BYTES:
                buckets.download(name, partial)
            else:
                partial.write_bytes(buckets.read(name, 0, num_bytes + 1))  # a longer one is a wrong one
        except buckets.BucketError:
            stat()
            raise

    def whole() -> Path:
        return cache.get("files", split.fingerprint, num_bytes, fill, what=name, advice=advice)

    def read_whole(first: int, length: int) -> bytes:
        for _ in range(10):  # another process may need the room just now
            with contextlib.suppress(FileNotFoundError), open(whole(), "rb") as file:
                content = os.pread(file.fileno(), length, first)
                if len(content) == length:
                    return content
        raise ValueError(f"{cache.folder}: files in it are removed before they are read. Raise data.cache_bytes.")

    def read_range(first: int, length: int) -> bytes:
        content = buckets.read(name, first, length)
        if len(content) != length:
            raise wrong_size(first + len(content), num_bytes)
        return content

    if count <= MOST_BLOCKS_WHOLE:
        whole()
        page_bytes = _LOCAL_PAGE_BYTES if num_bytes > _MOST_LOCAL_BYTES else num_bytes
        most_pages = _MOST_LOCAL_BYTES // _LOCAL_PAGE_BYTES
        return Digests(count, read_whole, page_bytes, most_pages, verified_as=split.fingerprint)
    if (found := stat().num_bytes) != num_bytes:
        raise wrong_size(found, num_bytes)
    return Digests(count, read_range, PAGE_BYTES, _MOST_PAGES)
