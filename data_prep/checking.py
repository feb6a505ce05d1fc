"""What is wrong with a prepared dataset: every file, the manifest, and one against the other."""

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.engines.local import Workers
from data_prep.file_checks import Finding, check_file, file_checks
from data_prep.pages.progress import Progress
from data_prep.store.blocks_file import blocks_problem
from data_prep.store.files import read_json
from data_prep.store.fingerprints import fingerprint
from data_prep.store.manifest import (
    DOCUMENTS,
    INDEX,
    MANIFEST_NAME,
    WORK_DIR,
    Manifest,
    Shard,
    dataset_fingerprint,
    load,
    unigram_entropy,
)
from data_prep.store.names import PATTERNS, TFDS_FILES, blocks_name
from data_prep.store.places import exists, join, names_in
from data_prep.store.spec import FORMATS
from data_prep.store.tfds_metadata import tfds_metadata

OWN_FILES = (*PATTERNS, ".*", *TFDS_FILES)  # what in a dataset's directory must be named in its manifest


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a dataset."""

    text: str  # a sentence that starts with the path
    damaged: Shard | None = None  # a file that is not what was written, and could be made again

    def __str__(self) -> str:
        return self.text


def find_problems(directory: str, num_workers: int = 1) -> Iterator[Problem]:
    """All that is wrong: first the files that are not what was written, then what contradicts itself.

    Raises ValueError when there is no manifest to compare with, or it was altered.
    """
    directory = join(directory)
    manifest = load(directory)
    findings = _look_at_files(directory, manifest, num_workers)
    by_digest = {shard.digest: shard.name for shard in manifest.shards}
    for shard in manifest.shards:
        if problem := findings[shard.name].problem:
            other = by_digest.get(str(problem.found)) if problem.kind == "digest" else None
            yield Problem(f"{problem}" + (f" to {other}'s" if other else ""), damaged=shard)
    for name, split in manifest.splits.items():
        if problem := blocks_problem(directory, name, split):
            yield Problem(str(problem))
    yield from map(Problem, _contradictions(directory, manifest, findings))


def _look_at_files(directory: str, manifest: Manifest, num_workers: int) -> dict[str, Finding]:
    """What was found of each file, by its name."""
    findings: dict[str, Finding] = {}
    progress = Progress("check", sum(shard.num_bytes for shard in manifest.shards))
    with Workers(num_workers) as workers, contextlib.closing(progress):
        for job, result in workers.run(check_file, file_checks(directory, manifest), progress):
            if isinstance(result, Exception):
                raise result
            findings[job.shard.name] = result
    return findings


def _contradictions(directory: str, manifest: Manifest, findings: Mapping[str, Finding]) -> Iterator[str]:
    """What cannot be right although the files are what was written."""
    yield from _check_manifest(join(directory, MANIFEST_NAME), manifest)
    for name in manifest.splits:
        for format in (DOCUMENTS, INDEX, *manifest.spec.formats):
            found = [findings[shard.name] for shard in manifest.shards_of(name, format)]
            whole = bool(found) and all(finding.problem is None for finding in found)
            for finding in found:
                # A token file is read on into the next one, whose damage is named already.
                if whole or format not in FORMATS:
                    yield from finding.contradictions
            if whole and format == DOCUMENTS:
                yield from _check_documents(directory, manifest, name, found)
            elif whole and format in FORMATS:
                yield from _check_stream(directory, manifest, name, format, found)
    yield from _check_other_files(directory, manifest)


def _check_manifest(path: str, manifest: Manifest) -> Iterator[str]:
    """The manifest against itself."""
    found = dataset_fingerprint(manifest.splits, manifest.spec.tokenizer_digest)
    if found != manifest.fingerprint:
        yield f"{path}: fingerprint {manifest.fingerprint}, but its splits give {found}"
    for name, split in manifest.splits.items():
        for format in (*manifest.spec.formats, DOCUMENTS, INDEX):
            found = sum(shard.num_tokens for shard in manifest.shards_of(name, format))
            if found != split.num_tokens:
                yield (f"{path}: split {name} has {split.num_tokens} tokens, but its {format} files have {found}")


def _check_documents(directory: str, manifest: Manifest, name: str, found: Sequence[Finding]) -> Iterator[str]:
    """The tables of a split one after the other."""
    split, position = manifest.splits[name], 0
    for shard, finding in zip(manifest.shards_of(name, DOCUMENTS), found, strict=True):
        if finding.end < 0:  # no document starts here
            continue
        if finding.first != position:
            yield (f"{join(directory, shard.name)}: row 0 starts at {finding.first}, expected {position}")
        position = finding.end
    where = join(directory, DOCUMENTS)
    if position != split.num_tokens:
        yield f"{where}_*: documents end at token {position}, the split at {split.num_tokens}"
    num_rows = sum(shard.num_rows for shard in manifest.shards_of(name, DOCUMENTS))
    if num_rows != split.num_documents:
        yield f"{where}_*: {num_rows} documents, the manifest says {split.num_documents}"


def _check_stream(
    directory: str, manifest: Manifest, name: str, format: str, found: Sequence[Finding]
) -> Iterator[str]:
    """A split in one format as a whole."""
    split, where = manifest.splits[name], f"{directory}: split {name} as {format}"
    digest = fingerprint([block for finding in found for block in finding.blocks])
    if digest != split.fingerprint:
        yield f"{where}: fingerprint {digest}, expected {split.fingerprint}"
    counts_V = sum((finding.counts_V for finding in found), np.zeros((), np.int64))
    entropy = unigram_entropy(counts_V)
    if abs(entropy - split.unigram_entropy) > 1e-6:
        yield f"{where}: unigram entropy {entropy}, the manifest says {split.unigram_entropy}"
    vocab_size = manifest.spec.vocab_size
    if counts_V[vocab_size:].any():
        yield f"{where}: holds ids that the tokenizer does not have ({vocab_size} and more)"


def _check_other_files(directory: str, manifest: Manifest) -> Iterator[str]:
    """The files for TFDS, and files that look like ours and are not."""
    metadata = tfds_metadata(manifest.shards, manifest.spec.record_tokens, manifest.spec.vocab_size)
    for name, expected in metadata.items():
        path = join(directory, name)
        try:
            found = read_json(path)
        except ValueError as error:
            yield str(error)
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror})"
        else:
            if found is None:
                yield f"{path}: missing; TFDS cannot open the dataset without it"
            elif found != expected:
                yield f"{path}: does not describe this dataset's ArrayRecord files"
    known = {shard.name for shard in manifest.shards} | metadata.keys() | {MANIFEST_NAME}
    known |= set(map(blocks_name, manifest.splits))
    folders = [WORK_DIR] if exists(join(directory, WORK_DIR)) else []  # names_in knows no folders of a bucket
    for name in sorted({*names_in(directory), *folders}):
        ours = any(fnmatch.fnmatch(name, pattern) for pattern in OWN_FILES)
        if ours and name not in known:
            yield f"{join(directory, name)}: not in the manifest; left over from something else"
