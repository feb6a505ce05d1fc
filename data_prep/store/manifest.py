"""What a prepared dataset is: its spec, splits, shards and digests, in one `manifest.json`.

The manifest is written last, after everything that it names: a directory with a manifest is a
complete dataset. It holds file names only, so the directory may be moved or copied.
"""

import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.store import buckets
from data_prep.store.files import digest_json, json_bytes, read_json, write_json
from data_prep.store.locations import is_bucket
from data_prep.store.places import exists, join, names_in
from data_prep.store.spec import FORMATS, Spec
from data_prep.store.typed import Count, typed

MANIFEST_NAME = "manifest.json"
WORK_DIR = ".work"  # state of an unfinished preparation, inside the dataset's directory
FORMAT_VERSION = 2
SPLITS = ("train", "val")
DOCUMENTS = "documents"  # the third kind of shard: tables, always written
INDEX = "documents_index"  # the fourth: where each document of a table is, by its id and url
_STORED = (*FORMATS, DOCUMENTS, INDEX)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]{0,199}")


@dataclass(frozen=True, slots=True)  # there may be half a million
class Shard:
    """One file. A documents table lists the documents that *start* in its range of the stream."""

    name: str
    format: str  # "bin", "array_record", "documents" or "documents_index"
    split: str  # "train" or "val"
    num_tokens: Count  # of the stream, without padding; of a table: the length of its range
    num_rows: Count  # tokens of a .bin, records of an ArrayRecord file, rows of a table or index
    num_bytes: Count
    digest: str  # of the file

    def __post_init__(self):
        # A name from a file must not lead out of the dataset's directory, nor to what is no shard.
        name = self.name
        if not _NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise ValueError(f"name is {name!r:.80}, expected the name of a file in this directory")
        if not self.digest.isprintable() or len(self.digest) > 200:
            raise ValueError(f"digest is {self.digest!r:.80}, expected a BLAKE3 digest")
        if self.format not in _STORED:
            raise ValueError(f"format is {self.format!r:.80}, expected one of {', '.join(_STORED)}")


@dataclass(frozen=True)
class Split:
    num_tokens: Count
    num_documents: Count
    fingerprint: str  # of the token stream alone: see fingerprints.py
    unigram_entropy: float  # nats a token: the loss of a model that knows frequencies only


@dataclass(frozen=True)
class Source:
    """A stretch of the stream, val first, and the unit of input that it came from.

    What `check --repair` needs to make a lost file again.
    """

    unit: str  # name of the unit, as units.py names those of the spec's inputs
    num_tokens: Count
    digest: str  # of the tokens


@dataclass(frozen=True)
class Manifest:
    format_version: Count
    name: str
    spec: Spec
    splits: dict[str, Split]
    shards: tuple[Shard, ...]
    fingerprint: str  # of all the splits and the tokenizer
    sources: tuple[Source, ...] = ()  # empty where the stream was not made from text

    def shards_of(self, split: str, format: str) -> tuple[Shard, ...]:
        """The shards of one split in one format, in stream order; empty if there are none."""
        return tuple(s for s in self.shards if (s.split, s.format) == (split, format))


def dataset_fingerprint(splits: Mapping[str, Split], tokenizer_digest: str) -> str:
    """Equal for datasets with the same streams and tokenizer, whatever their files look like."""
    streams = {name: split.fingerprint for name, split in splits.items()}
    return digest_json({"splits": streams, "tokenizer": tokenizer_digest})


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy in nats of the distribution with these counts.

    >>> unigram_entropy(np.array([1, 1]))
    0.693147181
    """
    counts = counts_V[counts_V > 0].astype(np.float64)
    total = counts.sum()
    return float(round(math.log(total) - (counts * np.log(counts)).sum() / total, 9) + 0.0)


def save(manifest: Manifest, directory: str | os.PathLike) -> None:
    """Writes the manifest with its own digest; equal manifests give equal bytes.

    Raises ValueError: another one is in the bucket already. Here a lock keeps others out, there it can be lost.
    """
    fields = json.loads(json.dumps(dataclasses.asdict(manifest) | {"spec": manifest.spec.to_json()}))
    fields |= {"digest": digest_json(fields)}
    path = join(directory, MANIFEST_NAME)
    if not is_bucket(path):
        write_json(path, fields)
        return
    try:
        buckets.write(path, json_bytes(fields), if_version="absent")
    except buckets.Changed:
        if read_json(path) != fields:
            raise ValueError(
                f"{path}: somebody else completed a dataset there meanwhile, another one. Use another output directory."
            ) from None


def load(directory: str | os.PathLike) -> Manifest:
    """The manifest of a prepared dataset, in a directory or in a bucket.

    Raises:
      ValueError: there is none (unfinished, or another kind of directory), or it is damaged or
        of another format version. Says which, and what to do.
    """
    path = join(directory, MANIFEST_NAME)
    fields = read_json(path)
    if fields is None:
        if exists(join(directory, WORK_DIR)):
            raise ValueError(
                f"{directory}: preparation is not finished ({MANIFEST_NAME} is missing, {WORK_DIR} "
                "is there). Run the same command (data_prep.fineweb or data_prep.convert) again: it continues."
            )
        if is_bucket(path) and any(name.endswith(".bin") for name in names_in(os.fspath(directory))):
            raise ValueError(
                f"{directory}: holds .bin files without a {MANIFEST_NAME}, of which no digests are known. `python -m "
                f"data_prep.convert {shlex.quote(os.fspath(directory))} OUT` makes a prepared dataset of them."
            )
        what = f"no {MANIFEST_NAME} in it" if exists(os.fspath(directory)) else "no such directory"
        raise ValueError(
            f"{directory}: not a prepared dataset ({what}). `python -m data_prep.fineweb --input=sample "
            f"--output_dir={shlex.quote(os.fspath(directory))}` makes a small one of the embedded sample; "
            "--input takes your own files."
        )
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version!r:.80}, expected {FORMAT_VERSION}. Prepare the dataset "
            "again with this version of data_prep."
        )
    digest = fields.pop("digest", None)
    if (found := digest_json(fields)) != digest:
        raise ValueError(
            f"{path}: was altered: its content has digest {found}, but it says "
            f"{digest!r:.80}. Restore it from a copy, or prepare the dataset again."
        )
    try:
        return _manifest_of(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Prepare the dataset again.") from None


def _manifest_of(fields: dict[str, Any]) -> Manifest:
    """ValueError that names the field of a value that cannot be."""
    spec = Spec.from_json(fields.get("spec"))
    manifest = typed(Manifest, fields | {"spec": spec}, "")
    for split in manifest.splits:
        if split not in SPLITS:
            raise ValueError(f"splits has {split!r:.80}, expected {' and '.join(SPLITS)} only")
    if "train" not in manifest.splits:
        raise ValueError("splits has no train")
    names: set[str] = set()
    for number, shard in enumerate(manifest.shards):
        if shard.split not in manifest.splits:
            raise ValueError(f"shards[{number}].split is {shard.split!r:.80}, which is not among the splits")
        if shard.name in names:
            raise ValueError(f"shards[{number}].name is {shard.name}, which another shard has")
        names.add(shard.name)
    return manifest
