"""Inputs -> parts -> shards -> manifest, continuing from whatever is complete already."""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_prep.agreement import SHARDS, begin_or_continue, confirm_complete, forget_spec, refuse_strays
from data_prep.cuts import part_streams
from data_prep.disk_space import full_disk_in_words
from data_prep.encoders import choose_engine
from data_prep.engines.local import Workers, locked
from data_prep.inputs.paths import expand
from data_prep.inputs.units import Inspection
from data_prep.options import Options
from data_prep.outcome import Outcome
from data_prep.parts import PARTS, Part, noted_part
from data_prep.store.locations import InputError, is_remote
from data_prep.store.manifest import MANIFEST_NAME, WORK_DIR, Manifest, Source, save
from data_prep.store.places import check_writable, exists, join, names_in
from data_prep.store.spec import Spec
from data_prep.store.tokenizers import user_tokenizer
from data_prep.tokenizing import inspect_all, part_jobs, tokenize, warnings_about
from data_prep.writing import write_dataset


def prepare(
    options: Options,
    patterns: str,
    output_dir: str,
    num_workers: int,
    *,
    engine: str = "auto",
    verify: str = "sample",
) -> Outcome:
    """Makes the prepared dataset that `options` ask for in `output_dir`, or finishes making it.

    The work directory is left there: see `finishing.finish`.

    Args:
      options: what decides the bytes.
      patterns: the files, as `inputs.paths.expand` takes them.
      num_workers: processes; decides nothing but the time it takes, as do the next two.
      engine: what makes the ids, see `encoders.choose_engine`.
      verify: which documents to encode a second time, see `encoders.Verifier`.

    Raises:
      ValueError: a user's mistake, before any work, or PreparationError, after keeping the work.
      engines.local.WorkerDied: a worker process was killed.
    """
    tokenizer = user_tokenizer(options.tokenizer)
    engine = choose_engine(tokenizer, engine)
    output, work = join(output_dir), join(output_dir, WORK_DIR)
    if exists(join(output, MANIFEST_NAME)):
        return _already_complete(options, patterns, output)
    check_writable(output)
    found = inspect_all(expand(patterns), options.text_column)
    spec = options.spec(tokenizer, [inspection.identity for inspection in found])
    for line in warnings_about(found):
        print(f"warning: {line}", file=sys.stderr)
    print(_engine_in_words(tokenizer.name, engine, verify), file=sys.stderr)
    refuse_strays(output)
    with (
        full_disk_in_words(output, len(spec.formats), lambda: _num_tokens_ahead(spec, work)),
        locked(work) as confirm,
        Workers(num_workers, work) as workers,
    ):
        begin_or_continue(spec, output)
        jobs = part_jobs(found, spec, join(work, PARTS), engine, verify)
        parts = tokenize(jobs, spec.max_tokens, workers, work)
        confirm()
        manifest = _write(parts, spec, output, workers)
        confirm()
        save(manifest, output)
    return Outcome(
        manifest,
        num_empty=sum(part.counts.num_empty for part in parts),
        num_null=sum(part.counts.num_null for part in parts),
    )


def _write(parts: list[Part], spec: Spec, output: str, workers: Workers) -> Manifest:
    """Stage 2, and where the stream came from."""
    work = join(output, WORK_DIR)
    try:
        streams = part_streams(parts, join(work, PARTS), spec)
    except ValueError:
        # Other cuts of the same parts are welcome to this directory.
        forget_spec(work)
        raise
    manifest = write_dataset(streams, spec, output, join(work, SHARDS), workers)
    return replace(manifest, sources=tuple(Source(part.name, part.num_tokens, part.digest) for part in parts))


def _already_complete(options: Options, patterns: str, output: str) -> Outcome:
    """Compares the command with the complete dataset in `output`, and does nothing."""
    found: list[Inspection] | None = None
    if not is_remote(patterns):
        # The inputs may be gone by now, and need not be there; if they are, they must agree.
        with contextlib.suppress(InputError):
            found = inspect_all(expand(patterns), options.text_column)
    entries: list[Mapping[str, Any]] = [inspection.identity for inspection in found or ()]
    asked = options.spec(user_tokenizer(options.tokenizer), entries)
    return confirm_complete(output, asked, None if found is None else ())


def _engine_in_words(tokenizer: str, engine: str, verify: str) -> str:
    if engine != "gigatoken":
        return f"tokenizer {tokenizer}: text by text, without gigatoken"
    checked = {"all": "every document", "none": "no document", "sample": "0.1% of the documents"}
    return f"tokenizer {tokenizer}: by gigatoken; {checked[verify]} checked against the reference"


def _num_tokens_ahead(spec: Spec, work: str) -> int:
    """A rough estimate of how many tokens the stream will have."""
    parts = join(work, PARTS)
    noted = [noted_part(join(parts, name)) for name in names_in(parts) if name.endswith(".json")]
    done = [each[0].num_tokens for each in noted if each]
    # A token is four bytes of text, roughly; parquet is packed 2:1.
    num_tokens = sum(entry["size"] or 0 for entry in spec.inputs) // 2
    return max(min(num_tokens, spec.max_tokens or num_tokens), sum(done))
