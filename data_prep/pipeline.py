"""Inputs -> parts -> shards -> manifest, continuing from whatever is complete already."""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_prep.agreement import SHARDS, begin_or_continue, confirm_complete, forget_spec, refuse_strays
from data_prep.cuts import part_streams
from data_prep.disk_space import full_disk_in_words
from data_prep.encoders import choose_engine
from data_prep.engines.choice import EngineChoice
from data_prep.engines.engine import Engine
from data_prep.engines.locks import locked, shared
from data_prep.engines.slurm import UnitRange
from data_prep.inputs.paths import expand
from data_prep.inputs.units import Inspection
from data_prep.options import Options
from data_prep.outcome import Outcome, ShareOutcome
from data_prep.parts import PARTS, Part, PartJob, noted_part
from data_prep.store.locations import InputError, is_remote
from data_prep.store.manifest import MANIFEST_NAME, WORK_DIR, Manifest, Source, save
from data_prep.store.places import check_writable, exists, join, names_in
from data_prep.store.spec import Spec
from data_prep.store.tokenizers import user_tokenizer
from data_prep.tokenizing import Unreadable, inspect_all, part_jobs, tokenize, warnings_about
from data_prep.writing import write_dataset


@dataclass(frozen=True)
class Wanted:
    """A preparation: what is made of what, and where.

    Args:
      options: what decides the bytes.
      patterns: the files, as `inputs.paths.expand` takes them.
      tokenizer_engine: what makes the ids, see `encoders.choose_engine`; decides nothing but the
        time it takes, as does the next one.
      verify: which documents to encode a second time, see `encoders.Verifier`.
    """

    options: Options
    patterns: str
    output_dir: str
    tokenizer_engine: str = "auto"
    verify: str = "sample"

    @property
    def output(self) -> str:
        return join(self.output_dir)

    @property
    def work(self) -> str:
        return join(self.output_dir, WORK_DIR)


def prepare(wanted: Wanted, engine: EngineChoice, *, require_parts: bool = False) -> Outcome:
    """Makes the prepared dataset that is wanted, or finishes making it.

    The work directory is left there: see `finishing.finish`.

    Args:
      engine: where jobs run; decides nothing but the time it takes.
      require_parts: tokenize nothing: all parts have been made by tasks.

    Raises:
      ValueError: a user's mistake, before any work, or PreparationError, after keeping the work.
      engines.engine.WorkerDied: a worker process was killed.
    """
    output, work = wanted.output, wanted.work
    if exists(join(output, MANIFEST_NAME)):
        choose_engine(user_tokenizer(wanted.options.tokenizer), wanted.tokenizer_engine)
        return _already_complete(wanted.options, wanted.patterns, output)
    engine.check(output)
    check_writable(output)
    spec, jobs = _plan(wanted)
    with (
        full_disk_in_words(output, len(spec.formats), lambda: _num_tokens_ahead(spec, work)),
        locked(work) as hold,
        engine.open(hold) as workers,
    ):
        begin_or_continue(spec, output)
        parts = tokenize(jobs, spec.max_tokens, workers, work, makes_parts=not require_parts)
        hold.confirm()
        manifest = _write(parts, spec, output, workers)
        hold.confirm()
        save(manifest, output)
    return Outcome(
        manifest,
        num_empty=sum(part.counts.num_empty for part in parts),
        num_null=sum(part.counts.num_null for part in parts),
    )


def prepare_share(wanted: Wanted, engine: EngineChoice, unit_range: UnitRange) -> Outcome | ShareOutcome:
    """Makes the parts of one task of several, which may be at work at the same time.

    Raises: as `prepare`.
    """
    output, work = wanted.output, wanted.work
    if exists(join(output, MANIFEST_NAME)):
        return _already_complete(wanted.options, wanted.patterns, output)
    check_writable(output)
    spec, jobs = _plan(wanted)
    own = unit_range.of([job.unit.num_bytes if isinstance(job, PartJob) else 0 for job in jobs])
    with (
        full_disk_in_words(output, len(spec.formats), lambda: _num_tokens_ahead(spec, work)),
        shared(work, unit_range.index, unit_range.num_tasks) as hold,
        engine.open(hold) as workers,
    ):
        begin_or_continue(spec, output)
        share = jobs[own.start : own.stop]
        parts = tokenize(share, spec.max_tokens, workers, work, is_share=True)
        hold.confirm()
    return ShareOutcome(
        str(unit_range),
        num_units=len(parts),
        num_reused=sum(part.reused for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
    )


def _plan(wanted: Wanted) -> tuple[Spec, list[PartJob | Unreadable]]:
    """What will be made, and stage 1's jobs for it. Says what is odd about the inputs."""
    options = wanted.options
    tokenizer = user_tokenizer(options.tokenizer)
    tokenizer_engine = choose_engine(tokenizer, wanted.tokenizer_engine)
    found = inspect_all(expand(wanted.patterns), options.text_column)
    spec = options.spec(tokenizer, [inspection.identity for inspection in found])
    for line in warnings_about(found):
        print(f"warning: {line}", file=sys.stderr)
    print(_engine_in_words(tokenizer.name, tokenizer_engine, wanted.verify), file=sys.stderr)
    refuse_strays(wanted.output)
    return spec, part_jobs(found, spec, join(wanted.work, PARTS), tokenizer_engine, wanted.verify)


def _write(parts: list[Part], spec: Spec, output: str, workers: Engine) -> Manifest:
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
