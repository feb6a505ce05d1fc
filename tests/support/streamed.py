"""Datasets of a few blocks of random tokens, in a directory and in a bucket."""

from pathlib import Path

import numpy as np

from data_prep.store import buckets, manifest
from data_prep.store.blocks_file import DIGEST_BYTES, write_blocks
from data_prep.store.files import digest_of
from data_prep.store.fingerprints import block_digests, fingerprint
from data_prep.store.manifest import Manifest, Shard, Split, dataset_fingerprint
from data_prep.store.names import shard_name
from data_prep.store.spec import Spec
from data_prep.store.token_bin import token_dtype, write_tokens
from data_prep.store.tokenizers import ByteTokenizer


def read_blocks(path: str | Path) -> list[bytes]:
    """The digests in a blocks file."""
    content = Path(path).read_bytes()
    return [content[first : first + DIGEST_BYTES] for first in range(0, len(content), DIGEST_BYTES)]


def make_streams(
    directory: Path,
    *,
    train: int,
    val: int = 0,
    shard_tokens: int = 1_500_000,
    vocab_size: int = 257,
    seed: int = 0,
    bin_header: str = "short",
) -> Path:
    """A dataset of .bin shards and blocks files, without documents."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype, rng = token_dtype(vocab_size), np.random.default_rng(seed)
    shards, splits = [], {}
    for split, num_tokens in {"train": train, "val": val}.items():
        if not num_tokens:
            continue
        tokens = rng.integers(0, vocab_size, num_tokens).astype(dtype)
        firsts = range(0, num_tokens, shard_tokens)
        for index, first in enumerate(firsts):
            piece, name = tokens[first : first + shard_tokens], shard_name("bin", split, index, len(firsts))
            write_tokens(directory / name, [piece], len(piece), dtype=dtype, header=bin_header)
            num_bytes, digest = (directory / name).stat().st_size, digest_of(directory / name)
            shards.append(Shard(name, "bin", split, len(piece), len(piece), num_bytes, digest))
        digests = list(block_digests([tokens]))
        write_blocks(directory, split, digests)
        splits[split] = Split(num_tokens, 0, fingerprint(digests), 1.0)
    spec = Spec(
        source="random",
        inputs=(),
        tokenizer="byte",
        tokenizer_digest=ByteTokenizer.digest,
        vocab_size=vocab_size,
        end_of_text=256,
        text_column="text",
        formats=("bin",),
        bin_header=bin_header,
        shard_tokens=shard_tokens,
        record_tokens=64,
        record_compression="none",
        val_tokens=val,
    )
    manifest.save(
        Manifest(
            format_version=manifest.FORMAT_VERSION,
            name="fineweb",
            spec=spec,
            splits=splits,
            shards=tuple(shards),
            fingerprint=dataset_fingerprint(splits, spec.tokenizer_digest),
        ),
        directory,
    )
    return directory


def upload(directory: Path, url: str) -> str:
    """Its URL."""
    for path in sorted(directory.iterdir()):
        if path.is_file():
            buckets.upload(path, buckets.join(url, path.name))
    return url
