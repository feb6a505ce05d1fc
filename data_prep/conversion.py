"""Shards -> a new prepared dataset, continuing from whatever is complete already."""

from typing import Any

from data_prep.agreement import SHARDS, begin_or_continue, refuse_strays
from data_prep.bare_shards import BareShards
from data_prep.disk_space import full_disk_in_words
from data_prep.engines.choice import EngineChoice
from data_prep.engines.locks import locked
from data_prep.options import Options
from data_prep.outcome import Outcome
from data_prep.prepared_dataset import PreparedDataset
from data_prep.store.locations import is_bucket
from data_prep.store.manifest import MANIFEST_NAME, WORK_DIR, save
from data_prep.store.places import check_writable, exists, join, remove_tree, same_place
from data_prep.writing import write_dataset


def open_origin(
    source: str, changes: dict[str, Any], tokenizer: str | None, num_shards: int | None, headerless: str | None = None
) -> PreparedDataset | BareShards:
    """What IN is. Raises ValueError for options that it cannot have."""
    if not _is_prepared(source):
        options = Options(source, 0, tokenizer=tokenizer or "gpt2", **changes)
        return BareShards(options, num_shards, headerless, guesses_tokenizer=tokenizer is None)
    if headerless is not None:
        raise ValueError(f"{source}: is a prepared dataset, whose files have headers; leave out --headerless")
    if num_shards is not None:
        raise ValueError(f"{source}: a prepared dataset is converted whole, without --num_shards")
    origin = PreparedDataset(source, changes)
    there = origin.spec("").tokenizer
    if tokenizer not in (None, there):
        raise ValueError(
            f"{source}: was prepared by the tokenizer {there}, and ids do not become "
            f"{tokenizer}'s. Leave --tokenizer out, or prepare the text again."
        )
    return origin


def _is_prepared(source: str) -> bool:
    """Whether IN is a prepared dataset, complete or not."""
    if "://" in source and (not is_bucket(source) or any(char in source for char in "*?[{,")):
        return False  # several files, or what is read only
    return any(exists(join(source, name)) for name in (MANIFEST_NAME, WORK_DIR))


def convert(
    source: str,
    output_dir: str,
    changes: dict[str, Any],
    engine: EngineChoice,
    *,
    tokenizer: str | None = None,
    num_shards: int | None = None,
    headerless: str | None = None,
) -> Outcome:
    """Makes a prepared dataset of the shards that `source` names, or finishes making it.

    The work directory is left there: see `finishing.finish`.

    Args:
      source: IN, as the command line takes it.
      changes: the values of CHANGEABLE that differ from IN's, or from the defaults of `Options`.
      engine: where jobs run; decides nothing but the time it takes.
      tokenizer: of shards without a manifest; None is gpt2.
      num_shards: how many training shards of those; None is all.
      headerless: uint16 or uint32 where .bin files are ids of that kind and nothing else (nanoGPT's).

    Raises:
      ValueError: a user's mistake, before any work, or damaged input; what is done is kept.
      engines.engine.WorkerDied: a worker process was killed.
    """
    output, work = join(output_dir), join(output_dir, WORK_DIR)
    if same_place(source, output):
        raise ValueError(f"{output_dir}: is both IN and OUT; write into another directory")
    origin = open_origin(source, changes, tokenizer, num_shards, headerless)
    if exists(join(output, MANIFEST_NAME)):
        return origin.confirm(output)
    engine.check(output)
    check_writable(output)
    spec = origin.spec(output)
    refuse_strays(output)
    with (
        full_disk_in_words(output, len(spec.formats), lambda: origin.num_tokens),
        locked(work) as hold,
        engine.open(hold) as workers,
    ):
        begin_or_continue(spec, output)
        tokens, tables = origin.read(work, workers)
        manifest = write_dataset(tokens, spec, output, join(work, SHARDS), workers, tables)
        try:
            manifest = origin.finish(manifest)
        except ValueError:
            # The notes call files whole that came of something else than they say.
            remove_tree(join(work, SHARDS))
            raise
        hold.confirm()
        save(manifest, output)
    return Outcome(manifest)
