"""What a user says of the data, and the plan stage that it comes to."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from data_prep.store.block_cache import LEAST_BYTES, BlockCache
from data_prep.store.buckets import is_bucket
from data_prep.store.datasets import Format, TokenDataset, Verify, open_dataset
from gpt_pretrain import checks
from gpt_pretrain.data.asked_edits import (
    Edits,
    StepRange,
    Steps,
    Target,
    TokenSpan,
    WindowList,
    Windows,
    documents_of,
    inserted_document,
    inserted_name,
    spans_of,
)
from gpt_pretrain.data.mixture import counts_of
from gpt_pretrain.data.order import SHUFFLES, Shuffle
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream, windows_overlapping
from gpt_pretrain.text_files import read_text


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which order.

    Attributes:
      dir: a prepared dataset (`data_prep.fineweb --output_dir`), in a directory or a bucket (gs://, s3://), or a
        directory or glob of .bin files.
      format: "bin", "array_record", or "auto" for the first of these that is there. Same windows either way.
      seed: of the order of windows.
      seq_len: tokens a window; also the number of positions of the model, unless `model.block_size` says more.
      verify: "digest" reads every byte at the start, "size" none, "auto" all up to 1 GiB, and beyond each byte once
        while training runs.
      mixture: several datasets instead of `dir`: {"name": ("directory", weight)}, or ("directory", weight,
        max_epochs). Weights are relative; each stream is shuffled and repeated on its own. Listed in any order.
      mixture_block: every block of this many examples has exactly the mixture's proportions.
      shuffle: "global", "block" or "none"; see `order.WindowOrder`.
      shuffle_block_windows, shuffle_group_blocks: of "block".
      exclude: ids of documents whose windows are left out, or a text file of ids, one a line. All later rows move.
      substitute: the same, for documents whose windows are replaced in place by windows that the run does not reach: no
        other row changes. The list may also have `Windows` and `Steps`.
      mask: the same, for documents whose tokens are read but not learned: they do not count as targets. The list may
        also have `Windows`.
      insert: documents of other prepared datasets that overwrite the front of given rows:
        [("directory", "document id", [(step, row), ...]), ...], steps from 1, rows of the global batch from 0.
      max_epochs: refuse a run that would see a stream more often than this; None for no limit.
      document_mask: attention stays within a document, positions restart at end-of-text.
      cache_dir: where blocks of datasets in buckets are kept; None for gpt_pretrain/data in the user's cache folder.
      cache_bytes: how much that may hold; None for half of what is free there, the cache included, at most 1 TB.
      tokenizer: the one that made the data, where it is your own: a file or "module:Class". What a dataset says itself
        is never imported; yours is compared with the digest that the dataset has. Only text needs it: samples.
    """

    dir: str = "data/fineweb-10BT"
    format: Format = "auto"
    seed: int = 0
    seq_len: int = 1024
    verify: Verify = "auto"
    mixture: Mapping[str, Sequence] | None = None
    mixture_block: int = 1000
    shuffle: Shuffle = "global"
    shuffle_block_windows: int = 1024
    shuffle_group_blocks: int = 32
    exclude: str | Sequence[str] = ()
    substitute: str | Sequence[str | Windows | Steps] = ()
    mask: str | Sequence[str | Windows] = ()
    insert: Sequence[tuple[str, str, Sequence[tuple[int, int]]]] = ()
    max_epochs: float | None = None
    document_mask: bool = False
    tokenizer: str | None = None
    cache_dir: str | None = None
    cache_bytes: int | None = None

    def __post_init__(self):
        for name in ("seq_len", "mixture_block", "shuffle_block_windows", "shuffle_group_blocks"):
            value = checks.whole_number(f"data.{name}", getattr(self, name), least=1, most=checks.MOST_ROWS)
            object.__setattr__(self, name, value)
        checks.seed("data.seed", self.seed)
        for name, known in (("format", get_args(Format)), ("verify", get_args(Verify)), ("shuffle", SHUFFLES)):
            checks.choice(f"data.{name}", getattr(self, name), known)
        checks.flag("data.document_mask", self.document_mask)
        if self.max_epochs is not None:
            checks.number("data.max_epochs", self.max_epochs, least=0, most=1e9)
        if self.tokenizer is not None:
            checks.text("data.tokenizer", self.tokenizer)
        object.__setattr__(self, "dir", checks.place("data.dir", self.dir))
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", checks.local_directory("data.cache_dir", self.cache_dir))
        if self.cache_bytes is not None:
            cache_bytes = checks.whole_number("data.cache_bytes", self.cache_bytes, least=LEAST_BYTES)
            object.__setattr__(self, "cache_bytes", cache_bytes)
        self._check_ids("exclude", str)
        self._check_ids("substitute", str | Windows | Steps)
        self._check_ids("mask", str | Windows)
        object.__setattr__(self, "insert", _checked_insertions(self.insert))
        if self.mixture is not None and not (isinstance(self.mixture, Mapping) and self.mixture):
            raise ValueError(
                f'data.mixture: found {self.mixture!r}, expected {{"name": ("directory", weight), ...}}, or None for '
                "data.dir"
            )
        for name, entry in (self.mixture or {}).items():
            if not _is_entry(entry) or not isinstance(name, str) or not name or "/" in name:
                raise ValueError(
                    f"data.mixture: found {name!r}: {entry!r}, expected a name without '/' and "
                    '("directory", weight) or ("directory", weight, max_epochs)'
                )
        if self.mixture is not None:
            expanded = {
                # By name, as gin sorts them in the config.gin that a run leaves: started from that, it is the same run.
                name: (checks.place("data.mixture", entry[0]), *entry[1:])
                for name, entry in sorted(self.mixture.items())
            }
            object.__setattr__(self, "mixture", expanded)

    def _check_ids(self, name: str, kinds: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            if value:
                object.__setattr__(self, name, checks.path(f"data.{name}", value))
        elif not isinstance(value, Sequence) or not all(isinstance(each, kinds) for each in value):
            raise ValueError(f"data.{name}: found {value!r}, expected a list of document ids, or a text file of them")

    @property
    def directories(self) -> dict[str, str]:
        """Directory of each stream by name; the name of one alone is ""."""
        if self.mixture is None:
            return {"": self.dir}
        return {name: entry[0] for name, entry in self.mixture.items()}

    def open(self) -> dict[str, TokenDataset]:
        """The datasets by stream name. ValueError: not there, damaged, or of several tokenizers."""
        is_remote = any(map(is_bucket, self.directories.values()))
        cache = BlockCache(self.cache_dir, self.cache_bytes) if is_remote else None
        datasets = {
            name: open_dataset(directory, format=self.format, verify=self.verify, cache=cache)
            for name, directory in self.directories.items()
        }
        first, *rest = datasets.values()
        for other in rest:
            if other.tokenizer_digest != first.tokenizer_digest:
                raise ValueError(
                    f"data.mixture: {first.directory} and {other.directory} have different tokenizers "
                    f"({first.tokenizer}, {other.tokenizer}). Prepare them with one."
                )
        return datasets

    def stage(self, datasets: Mapping[str, TokenDataset], batch_sizes: Sequence[tuple[int, int]]) -> Stage:
        """What the plan should be, as far as this configuration says. ValueError where it cannot be."""
        weights = [float(entry[1]) for entry in (self.mixture or {}).values()] or [1.0]
        counts = counts_of(weights, self.mixture_block) if len(weights) > 1 else (1,)
        excluded = self._excluded(datasets)
        streams = tuple(
            Stream(
                name, dataset.fingerprint, dataset.splits["train"].num_tokens, count, excluded=excluded.get(name, ())
            )
            for (name, dataset), count in zip(datasets.items(), counts, strict=True)
        )
        return Stage(
            seed=self.seed,
            seq_len=self.seq_len,
            batch_sizes=tuple(batch_sizes),
            streams=streams,
            shuffle=self.shuffle,
            block_windows=self.shuffle_block_windows,
            group_blocks=self.shuffle_group_blocks,
        )

    def check_epochs(self, plan: Plan, num_steps: int) -> None:
        """ValueError where a run of that many steps would see a stream more often than it may."""
        for name, epochs in plan.epochs(num_steps).items():
            limit = self._most_epochs(name)
            if limit is not None and epochs > limit:
                raise ValueError(
                    f"{name or self.dir}: would be seen {epochs:.2f} times in {num_steps} steps, expected at most "
                    f"{limit} (data.max_epochs, data.mixture). Lower train.num_tokens or its weight, or raise it."
                )

    def limits_epochs(self, name: str) -> bool:
        """Whether the user said how often a stream may be seen."""
        return self._most_epochs(name) is not None

    def _most_epochs(self, name: str) -> float | None:
        entry = (self.mixture or {}).get(name, ())
        return entry[2] if len(entry) > 2 else self.max_epochs

    def open_inserted(self, datasets: Mapping[str, TokenDataset]) -> dict[str, TokenDataset]:
        """The datasets that documents are inserted from, by `insert`'s directories.

        Raises ValueError: not there, damaged, or of another tokenizer than `datasets`.
        """
        first, opened = next(iter(datasets.values())), {}
        for directory, _, _ in self.insert:
            if directory not in opened:
                cache = BlockCache(self.cache_dir, self.cache_bytes) if is_bucket(directory) else None
                opened[directory] = open_dataset(directory, verify=self.verify, cache=cache)
                if opened[directory].tokenizer_digest != first.tokenizer_digest:
                    raise ValueError(
                        f"data.insert: {directory} and {first.directory} have different tokenizers "
                        f"({opened[directory].tokenizer}, {first.tokenizer}). Prepare them with one."
                    )
        names = {inserted_name(directory): each.fingerprint for directory, each in opened.items()}
        if len(names) < len(opened):
            raise ValueError(f"data.insert: {', '.join(opened)} end in the same name, expected different ones")
        return opened

    def edits(self, datasets: Mapping[str, TokenDataset], inserted: Mapping[str, TokenDataset]) -> Edits:
        """What the plan should have edited in place. ValueError for a document that is not there."""
        return Edits(
            substitute=self._targets("substitute", datasets),
            mask=tuple(
                span
                for target in self._targets("mask", datasets)
                for span in (target.as_targets(self.seq_len) if isinstance(target, WindowList) else [target])
                if isinstance(span, TokenSpan)
            ),
            insert=tuple(
                inserted_document(inserted[directory], document_id, [(step - 1, row) for step, row in places])
                for directory, document_id, places in self.insert
            ),
        )

    def _targets(self, setting: str, datasets: Mapping[str, TokenDataset]) -> tuple[Target, ...]:
        """What `substitute` or `mask` names, in the streams."""
        named = self._ids(setting)
        spans = spans_of([each for each in named if isinstance(each, str)], datasets, f"data.{setting}")
        found: list[Target] = list(spans)
        for each in named:
            if isinstance(each, Steps):
                found.append(StepRange(each.first - 1, each.last))
            elif isinstance(each, Windows):
                if each.stream not in datasets:
                    raise ValueError(
                        f"data.{setting}: no stream {each.stream!r}, expected one of {', '.join(map(repr, datasets))}"
                    )
                dataset = datasets[each.stream]
                num_windows = (dataset.splits["train"].num_tokens - 1) // self.seq_len
                if max(each.numbers, default=0) >= num_windows:
                    raise ValueError(
                        f"data.{setting}: window {max(each.numbers)}, the stream has the windows 0 to {num_windows - 1}"
                    )
                found.append(WindowList(dataset.fingerprint, tuple(each.numbers)))
        return tuple(found)

    def _ids(self, setting: str) -> list[Any]:
        """The entries of a setting that may be a text file of ids."""
        ids = getattr(self, setting)
        if isinstance(ids, str) and ids:
            if not os.path.isfile(ids):
                raise ValueError(
                    f"data.{setting}: {ids}: no such file; expected a text file of document ids, one a line"
                )
            ids = read_text(ids).split("\n")
        ids = [each.strip() if isinstance(each, str) else each for each in ids]
        return [each for each in ids if each != ""]

    def _excluded(self, datasets: Mapping[str, TokenDataset]) -> dict[str, tuple[int, ...]]:
        """Windows of each stream that overlap an excluded document."""
        windows: dict[str, set[int]] = {name: set() for name in datasets}
        for name, document in documents_of(self._ids("exclude"), datasets, "data.exclude"):
            num_windows = (datasets[name].splits["train"].num_tokens - 1) // self.seq_len
            windows[name] |= set(windows_overlapping(document.start, document.length, self.seq_len, num_windows))
        return {name: tuple(sorted(each)) for name, each in windows.items() if each}


def _checked_insertions(given: Any) -> tuple[tuple[str, str, tuple[tuple[int, int], ...]], ...]:
    """`data.insert` with whole numbers and expanded directories. ValueError where it is none."""
    try:
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError
        entries = [(directory, name, [(step, row) for step, row in places]) for directory, name, places in given]
    except (TypeError, ValueError):
        raise ValueError(
            f'data.insert: found {given!s:.300}, expected [("directory", "document id", [(step, row), ...]), ...]'
        ) from None

    def place_of(step: Any, row: Any) -> tuple[int, int]:
        return (
            checks.whole_number("data.insert: step", step, least=1, most=checks.MOST_ROWS),
            checks.whole_number("data.insert: row", row, least=0, most=checks.MOST_ROWS),
        )

    return tuple(
        (
            checks.place("data.insert", directory),
            checks.text("data.insert: document id", name),
            tuple(place_of(*place) for place in places),
        )
        for directory, name, places in entries
    )


def _is_entry(entry) -> bool:
    """("directory", weight) or ("directory", weight, max_epochs)"""
    if isinstance(entry, str) or not isinstance(entry, Sequence) or not 2 <= len(entry) <= 3:
        return False
    try:
        checks.number("weight", entry[1], least=0, most=1e15)
        for each in entry[2:]:
            if each is not None:
                checks.number("max_epochs", each, least=0, most=1e9)
    except ValueError:
        return False
    return isinstance(entry[0], str | os.PathLike) and entry[1] > 0
