"""Other datasets that a run is validated on, and the bytes of text behind tokens."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.store.block_cache import BlockCache
from data_prep.store.buckets import is_bucket
from data_prep.store.datasets import TokenDataset, open_dataset
from data_prep.store.files import require_whole
from data_prep.store.token_sources import TokenSource, num_windows
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain import checks
from gpt_pretrain.data.config import DataConfig

log = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 1 << 20
METRICS = ("loss", "accuracy", "bits_per_byte")


def check_validation(given: object, streams: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """`train.validation` as name -> (directory, split).

    Args:
      streams: of the run by name, whose curves have these names already.

    Raises ValueError where it is none.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f'train.validation: found {given!r}, expected {{"name": "directory", ...}}, or None')
    found = {}
    for name, entry in given.items():
        place, split = (entry, "val") if isinstance(entry, str) else _pair(entry)
        if not isinstance(name, str) or not name or "/" in name or place is None or split not in ("train", "val"):
            raise ValueError(
                f"train.validation: found {name!r}: {entry!r}, expected a name without '/' and \"directory\", or "
                '("directory", "train") for another split than "val"'
            )
        if name in METRICS or name in streams:
            what = "a metric" if name in METRICS else "a stream of data.mixture"
            raise ValueError(f"train.validation: {name!r} is the name of {what}; expected another one")
        found[name] = (checks.place("train.validation", place), split)
    return found


def _pair(entry: object) -> tuple[Any, Any]:
    return (entry[0], entry[1]) if isinstance(entry, Sequence) and len(entry) == 2 else (None, None)


def open_validation(
    wanted: Mapping[str, tuple[str, str]] | None, run: TokenDataset, config: DataConfig, num_tokens: int
) -> dict[str, TokenSource]:
    """The streams of `check_validation`, by name.

    Args:
      run: a dataset that the run is trained on, whose tokenizer they share.
      num_tokens: that will be read of each, from its front: the shards that hold them are compared with their digests.

    Raises ValueError: not there, damaged, without that split, too short, or of another tokenizer.
    """
    found = {}
    for name, (directory, split) in (wanted or {}).items():
        where = f"train.validation {name!r}: {directory}"
        cache = BlockCache(config.cache_dir, config.cache_bytes) if is_bucket(directory) else None
        dataset = open_dataset(directory, verify=config.verify, cache=cache)
        ours, theirs = ((each.tokenizer_digest, each.vocab_size, each.end_of_text) for each in (run, dataset))
        is_known = None not in (ours[0], theirs[0])
        if (ours if is_known else ours[1:]) != (theirs if is_known else theirs[1:]):
            raise ValueError(
                f"{where}: has ids of tokenizer {dataset.tokenizer!r:.200} (digest {theirs[0]}), the run those of "
                f"{run.tokenizer!r:.200} ({ours[0]}). Prepare it with that."
            )
        if split not in dataset.splits:
            raise ValueError(
                f"{where}: has no split {split!r}, only {', '.join(dataset.splits)}. Name one: "
                f'{{"{name}": ("{directory}", "train")}}'
            )
        try:
            num_windows(dataset.splits[split], config.seq_len)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for shard in dataset.unverified:
            if shard.split == split and shard.start <= num_tokens:
                require_whole(shard.path, shard.num_bytes, shard.digest)
        found[name] = dataset.splits[split]
    return found


def byte_lengths_of(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of text that each id stands for: int64 (vocab_size,), 0 for end-of-text.

    None where ids are no pieces of the text's bytes, as with tokenizers that change the text first.
    """
    method = getattr(tokenizer, "byte_lengths", None)
    return None if method is None else method()


def num_bytes_of(source: TokenSource, num_targets: int, lengths_V: np.ndarray) -> int:
    """Bytes of the tokens [1, num_targets + 1) of a stream: the targets of its first windows."""
    total = 0
    for start in range(1, num_targets + 1, _TOKENS_AT_ONCE):
        length = min(_TOKENS_AT_ONCE, num_targets + 1 - start)
        total += int(lengths_V[source.read(np.array([start]), length)[0]].sum())
    return total
