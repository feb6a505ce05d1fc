"""Fetching blocks from a bucket before they are needed: the plan says which, and in which order.

Nothing here decides what a batch holds: what was not fetched ahead is fetched when it is read.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.store.block_cache import FETCHING_THREADS, SOON, BlockCache
from data_prep.store.block_source import BlockSource
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.token_sources import TokenSource
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage

log = logging.getLogger(__name__)

LOOK_AHEAD = 0.75  # of the cache: the rest is for what is read beside the plan, and to keep what is needed later
MOST_LOOK_AHEAD_BYTES = 4 << 30  # what was fetched and is not used, as the run is stopped, was paid for nothing
_CHUNK_EXAMPLES = 1 << 15  # looked up at once, at most
_POLL_SECS = 0.02
_LOOK_AGAIN_SECS = 30.0  # whether all is still in the cache
_AFTER_ERROR_SECS = 1.0
_SAMPLES = 16  # places of a block at which its next use is looked up, at most
_SAMPLED_AT_ONCE = 1 << 14  # blocks
_MOST_LOOKED_AT = 1 << 17  # blocks: to look whether each is in the cache takes 0.3 s
_SEARCH_AGAIN_SECS = 60.0  # which block it is that another process has brought

Key = tuple[str, int]  # a stream's name, and a block of it


class _Need(NamedTuple):
    """A block that is to be fetched, and whether it is to stay: of some only the first tokens are needed, once."""

    row: int
    key: Key
    stays: bool


@dataclasses.dataclass
class _Chunk:
    """What some steps need.

    Attributes:
      stop: index of the step after them.
      needs: in order of use; the first `num_admitted` of them are fetched, and stay in the cache until `stop`.
    """

    stop: int
    num_tokens: int
    needs: list[_Need]
    num_admitted: int = 0


@dataclasses.dataclass(frozen=True)
class FirstBatch:
    """What the first batch waits for.

    Attributes:
      num_blocks, num_missing: that it needs, and of these what was not in the cache.
      missing_bytes: of them.
      bytes_per_sec: measured in the first fetches; None where nothing had to be fetched.
    """

    num_blocks: int
    num_missing: int
    missing_bytes: int
    bytes_per_sec: float | None

    @property
    def secs(self) -> float:
        """Until it is there, from the beginning on."""
        return self.missing_bytes / self.bytes_per_sec if self.bytes_per_sec else 0.0


class FetchAhead:
    """Threads that have the cache hold what the next steps need.

    All processes of a run walk the same steps with all rows of each: what one host's rows need is soon needed by the
    others', and so those of one machine agree on what stays in their cache.

    Args:
      sources: by name of the streams; those that do not come from a bucket are left alone.
      plan, first_index, num_steps: as for `batches.Batches`.
      say: called once, from another thread, when the network was measured.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenSource],
        plan: Plan,
        *,
        first_index: int,
        num_steps: int,
        say: Callable[[FirstBatch], None] = lambda _: None,
    ):
        self.sources = {name: each for name, each in sources.items() if isinstance(each, BlockSource)}
        self._plan, self._end, self._say = plan, first_index + num_steps, say
        self._reading = self._walked = first_index  # the step that is read, and the one that is looked up next
        self._chunks: deque[_Chunk] = deque()
        self._uses: dict[Key, int] = {}  # in how many chunks each is that is to stay
        self._under_way: set[Key] = set()
        self._key_of: dict[str, Key | None] = {}  # by digest, of what is or was in the cache; None: of another stream
        self._searched_secs = -_SEARCH_AGAIN_SECS
        self._staying_bytes = 0
        self._tokens_admitted = self._bytes_missed = 0
        self._first: FirstBatch | None = None
        self._before = (0, 0.0)  # what the cache had fetched until the start
        self._jobs: queue.Queue[Key | None] = queue.Queue(FETCHING_THREADS)
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self.cache: BlockCache | None = None
        if self.sources and num_steps > 0:
            self.cache = next(iter(self.sources.values())).cache
            self.look_ahead_bytes = min(int(self.cache.max_bytes * LOOK_AHEAD), MOST_LOOK_AHEAD_BYTES)
            self._threads = [
                threading.Thread(target=target, daemon=True, name="fetch-ahead")
                for target in (self._run, *[self._work] * FETCHING_THREADS)
            ]

    def start(self) -> None:
        if self.cache:
            self.cache.future, self._before = self, self.cache.meter.read()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Begins nothing new. What is under way ends by itself; nobody waits for it."""
        self._ending.set()
        with contextlib.suppress(queue.Full, queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads[1:]:
            with contextlib.suppress(queue.Full):
                self._jobs.put_nowait(None)
        if self.cache and self.cache.future is self:
            self.cache.future = None

    def at(self, step_index: int) -> None:
        """A step is read; those before it will not be again."""
        self._reading = step_index

    @property
    def bytes_per_token(self) -> float | None:
        """How much has to be fetched for each token that is trained on; None where that is not known yet."""
        return self._bytes_missed / self._tokens_admitted if self._tokens_admitted else None

    @property
    def bytes_per_sec(self) -> float | None:
        """What the network gave; None where nothing was fetched."""
        num_bytes, secs = self._fetched
        return num_bytes / secs if num_bytes and secs else None

    @property
    def _fetched(self) -> tuple[int, float]:
        """(bytes, seconds) since the start, on-demand ones included."""
        if not self.cache:
            return 0, 0.0
        num_bytes, secs = self.cache.meter.read()
        return num_bytes - self._before[0], secs - self._before[1]

    def next_uses(self, digests: Sequence[str]) -> list[float | None]:
        """See `block_cache.Future`: in examples from here."""
        self._search(digests)
        # What was looked up and has no room yet comes before all that is only estimated.
        needs = [each for chunk in list(self._chunks) for each in chunk.needs]
        next_ones = {each.key: 1e-9 * (len(needs) - i) for i, each in enumerate(reversed(needs))}
        all_digests = [source.digests for source in self.sources.values()]
        files = {each.verified_as for each in all_digests if each.is_read_again}
        keys = [self._key_of.get(digest) for digest in digests]
        about = self._about({key for key in keys if key and key not in next_ones})
        found: list[float | None] = []
        for digest, key in zip(digests, keys, strict=True):
            if key is None:
                found.append(SOON if digest in files else None)
            else:
                found.append(SOON if key in self._uses else next_ones.get(key, about.get(key)))
        return found

    def _search(self, digests: Sequence[str]) -> None:
        """Finds out which blocks these are. Those that this process brought or looked at are known; for the others,
        such as an earlier run left, the blocks files that are on this machine are searched."""
        for name, source in self.sources.items():
            for digest, block in source.brought.copy().items():
                if self._key_of.get(digest) is None:
                    self._key_of[digest] = name, block
        if len(self._key_of) > 2 * len(digests) + _MOST_LOOKED_AT:  # what was in the cache and is not any more
            there = set(digests)
            for digest, key in self._key_of.copy().items():
                if digest not in there and key not in self._uses:
                    self._key_of.pop(digest, None)
        unknown = [digest for digest in digests if digest not in self._key_of]
        now = time.monotonic()
        if unknown and now - self._searched_secs >= _SEARCH_AGAIN_SECS:
            found: dict[str, Key | None] = dict.fromkeys(unknown)
            for name, source in self.sources.items():
                found.update((digest, (name, block)) for digest, block in source.blocks_with(unknown).items())
            for digest, key in found.items():  # `_next` may be learning at the same time
                self._key_of.setdefault(digest, key)
            self._searched_secs = time.monotonic()

    def _about(self, keys: Collection[Key]) -> dict[Key, float]:
        """About how many examples from now each block is needed."""
        position, stage, found = self._plan.position(self._reading), self._plan.stage_at(self._reading), {}
        blocks_of = _by_stream(keys)
        for index, stream in enumerate(stage.streams):
            blocks = np.array(blocks_of.get(stream.name, ()), np.int64)
            last = stage.num_windows(index) - 1
            samples = min(_SAMPLES, max(1, BLOCK_TOKENS // (stage.block_windows * stage.seq_len)))
            offsets = ((np.arange(samples) + 0.5) * (BLOCK_TOKENS / samples)).astype(np.int64)
            for some in np.split(blocks, range(_SAMPLED_AT_ONCE, len(blocks), _SAMPLED_AT_ONCE)):
                windows = np.minimum((some[:, None] * BLOCK_TOKENS + offsets) // stage.seq_len, last)
                about = stage.about_next(index, windows.reshape(-1), position).reshape(windows.shape).min(1)
                found.update(zip(((stream.name, block) for block in some.tolist()), about.tolist(), strict=True))
        return found

    def _run(self) -> None:
        looked = -_LOOK_AGAIN_SECS
        clock = 0.0
        while not self._ending.is_set():
            key, pause = None, _POLL_SECS
            try:
                if clock - looked >= _LOOK_AGAIN_SECS:
                    looked = clock
                    for source in self.sources.values():
                        source.forget_removed()
                    if self._all_here():
                        if self._first is None:
                            self._chunk()
                        self._measured()
                        self._forget_chunks()
                        self._ending.wait(_LOOK_AGAIN_SECS)
                        clock += _LOOK_AGAIN_SECS
                        continue
                key = self._next()
            except ValueError as error:  # a digest cannot be read: who reads the block gets it, too, and says it
                log.debug("%s", error)
                pause = _AFTER_ERROR_SECS
            if key is None:
                self._measured()
                self._ending.wait(pause)
                clock += pause
                continue
            while not self._ending.is_set():
                with contextlib.suppress(queue.Full):
                    self._jobs.put(key, timeout=_POLL_SECS)
                    break
                clock += _POLL_SECS
                self._measured()

    def _work(self) -> None:
        while (key := self._jobs.get()) is not None and not self._ending.is_set():
            name, block = key
            try:
                self.sources[name].bring(block)
            except ValueError as error:  # who reads it gets it, too, and says it
                log.debug("%s", error)
                self._ending.wait(_AFTER_ERROR_SECS)
            self._under_way.discard(key)

    def _all_here(self) -> bool:
        """Of few enough blocks to look at each."""
        counts = {name: len(each.digests) for name, each in self.sources.items()}
        if sum(counts.values()) > _MOST_LOOKED_AT:
            return False
        return all(self.sources[name].is_here(block) for name, count in counts.items() for block in range(count))

    def _forget_chunks(self) -> None:
        self._chunks.clear()
        self._uses.clear()
        self._staying_bytes = 0
        self._walked = max(self._walked, self._reading)

    def _next(self) -> Key | None:
        """What to fetch next; None where all of the look-ahead is there or under way."""
        while True:
            self._release()
            chunk = next((each for each in self._chunks if each.num_admitted < len(each.needs)), None)
            if chunk is None:
                if self._walked >= self._end or self._staying_bytes >= self.look_ahead_bytes:
                    return None
                self._walked = max(self._walked, self._reading)
                self._chunks.append(self._chunk())
                if not self._chunks[-1].needs:  # other streams only
                    self._chunks.pop()
                continue
            _, key, stays = chunk.needs[chunk.num_admitted]
            source = self.sources[key[0]]
            size, is_new = source.block_bytes(key[1]), key not in self._uses
            if is_new and self._staying_bytes + size > self.look_ahead_bytes:
                return None
            digest = source.digests[key[1]]
            if stays:
                self._key_of[digest] = key
                self._uses[key] = self._uses.get(key, 0) + 1
                self._staying_bytes += size * is_new
            chunk.num_admitted += 1
            if chunk.num_admitted == len(chunk.needs):
                self._tokens_admitted += chunk.num_tokens
            # A block that is here and whose first tokens are not known is read once, too.
            is_known = source.is_here(key[1]) if stays else source.has_head(key[1])
            if is_new and not is_known and key not in self._under_way:
                self._bytes_missed += size * (not source.is_here(key[1]))
                self._under_way.add(key)
                return key

    def _release(self) -> None:
        while self._chunks and self._chunks[0].stop <= self._reading:
            chunk = self._chunks.popleft()
            for _, key, stays in chunk.needs[: chunk.num_admitted]:
                if not stays:
                    continue
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]
                    self._staying_bytes -= self.sources[key[0]].block_bytes(key[1])

    def _chunk(self) -> _Chunk:
        """What the next steps need; those of the first one alone, as it is waited for."""
        first, stage = self._walked, self._plan.stage_at(self._walked)
        size = stage.batch_size(first)
        window_bytes = stage.seq_len * max(each.dtype.itemsize for each in self.sources.values())
        most = min(_CHUNK_EXAMPLES, self.look_ahead_bytes // (8 * window_bytes)) // size if self._first else 1
        stop = first + 1
        while stop < min(first + most, self._end) and self._plan.stage_at(stop) is stage:
            if stage.batch_size(stop) != size:
                break
            stop += 1
        positions = stage.position(first) + np.arange(size * (stop - first))
        needs = self._needs(stage, positions)
        blocks_of = _by_stream(each.key for each in needs)
        for name, blocks in blocks_of.items():
            self.sources[name].digests.read_ahead(blocks, self.sources[name].cache.threads)
        if self._first is None:
            keys = {each.key for each in needs}
            missing = [key for key in keys if not self.sources[key[0]].is_here(key[1])]
            missing_bytes = sum(self.sources[name].block_bytes(block) for name, block in missing)
            self._first = FirstBatch(len(keys), len(missing), missing_bytes, None)
        self._walked = stop
        return _Chunk(stop, len(positions) * stage.seq_len, needs)

    def _needs(self, stage: Stage, positions: np.ndarray) -> list[_Need]:
        """What the examples at these positions need, in order of use."""
        streams, windows = stage.examples_at(positions)
        found: list[_Need] = []
        for index, stream in enumerate(stage.streams):
            if source := self.sources.get(stream.name):
                rows = np.flatnonzero(streams == index)
                whole_and_heads = source.needed_at(windows[rows] * stage.seq_len, stage.seq_len + 1)
                for (blocks, places), stays in zip(whole_and_heads, (True, False), strict=True):
                    for block, row in zip(blocks.tolist(), rows[places].tolist(), strict=True):
                        found.append(_Need(row, (stream.name, block), stays))
        for row, insertion, part in stage.insertions_at(positions):
            if source := self.sources.get(insertion.name):
                first, stop = insertion.span(part, stage.seq_len)
                whole_and_heads = source.needed_at(np.array([insertion.start + first]), stop - first)
                for (blocks, _), stays in zip(whole_and_heads, (True, False), strict=True):
                    found += [_Need(row, (insertion.name, block), stays) for block in blocks.tolist()]
        return sorted(found)

    def _measured(self) -> None:
        """Says once what the first batch waits for, as soon as that is known."""
        first = self._first
        if first is None or (first.num_missing and not self._fetched[0]):
            return
        self._say(dataclasses.replace(first, bytes_per_sec=self.bytes_per_sec if first.num_missing else None))
        self._say = lambda _: None


def _by_stream(keys: Iterable[Key]) -> dict[str, list[int]]:
    """[("a", 3), ("b", 1), ("a", 2)] -> {"a": [3, 2], "b": [1]}"""
    found: dict[str, list[int]] = {}
    for name, block in keys:
        found.setdefault(name, []).append(block)
    return found


def cost_in_words(sources: Mapping[str, TokenSource], stage: Stage, batch_size: int) -> str | None:
    """What a cache costs that is too small for the order; None where it is not.

    An order that draws from the whole stream needs a block anew as often as it is not in the cache.
    """
    remote = {name: each for name, each in sources.items() if isinstance(each, BlockSource)}
    total, room = (
        sum(each.num_bytes for each in remote.values()),
        min((each.cache.max_bytes for each in remote.values()), default=0),
    )
    if total <= room:
        return None
    if stage.shuffle == "block":
        windows = stage.block_windows * stage.group_blocks
        group = sum(min(windows * stage.seq_len, each.num_tokens) * each.dtype.itemsize for each in remote.values())
        if 2 * group <= room * LOOK_AHEAD:  # one that is read, and the next
            return None
        return (
            f"the {stage.group_blocks} blocks of a group of the shuffle take {group:,} bytes. Two groups should have "
            f"room in three quarters of the cache, which holds {room:,}; else some are fetched again and again. Raise "
            "data.cache_bytes, or lower data.shuffle_group_blocks"
        )
    if stage.shuffle == "none":
        return None
    num_examples, a_step, touched = sum(stream.count for stream in stage.streams), 0.0, 0.0
    for stream in stage.streams:
        if source := remote.get(stream.name):
            count, draws = len(source.digests), batch_size * stream.count / num_examples
            blocks = count * (1 - (1 - 1 / count) ** draws)
            touched += blocks
            a_step += blocks * source.num_bytes / count * (1 - room / total)
    return (
        f"with data.shuffle='global' each batch takes windows from about {touched:,.0f} blocks anywhere in "
        f"{total:,} bytes, of which the cache holds {room:,}: about {a_step:,.0f} bytes are fetched for every step of "
        f"{batch_size} windows. Set data.shuffle='block', which uses up what it fetched, or raise data.cache_bytes to "
        f"{total:,}"
    )
