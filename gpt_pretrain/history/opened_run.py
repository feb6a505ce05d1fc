"""A run opened for questions: its plan, its ledger and its datasets. What `replay` and `inspect` share.

Users count updates from 1, as the training log does; a plan counts from 0. This file is where the one
becomes the other. Nothing here knows of JAX.
"""

import argparse
import dataclasses
import functools
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.store import manifest as manifest_lib
from data_prep.store.buckets import is_bucket
from data_prep.store.datasets import TokenDataset, Verify, open_dataset
from data_prep.store.documents import DocumentTables
from data_prep.store.token_sources import TokenSource
from data_prep.store.tokenizers import Tokenizer, dataset_tokenizer, user_tokenizer
from gpt_pretrain.data import ledger as ledger_lib
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.row_edits import INSERTED
from gpt_pretrain.data.run import open_run
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.mirrors import Place
from gpt_pretrain.train.run_copies import run_at

NUMBERING = (
    "Updates are numbered as in the training log: the first one is 1. Rows, positions, windows, tokens and epochs "
    "count from 0, and spans [a, b) end before b."
)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """The option that `OpenedRun` takes as `data_dirs`."""
    parser.add_argument(
        "--data_dir",
        nargs="+",
        default=(),
        metavar="[NAME=]DIR",
        help="where the datasets are now, if not where the run had them; NAME is a stream of the mixture",
    )


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A run's data, with every dataset opened when it is first asked for.

    Args:
      save_dir: of the run.
      data_dirs: "DIR", or "NAME=DIR" of one stream: datasets that are not where the run had them.
      tokenizer_name: as the user typed it, where the datasets were made by one that is not ours.
      verify: of the datasets, see `open_dataset`; "size" where what is read is compared with the ledger anyway.

    Raises ValueError: no run there, or a name that no stream has.
    """

    save_dir: str
    data_dirs: Sequence[str] = ()
    tokenizer_name: str | None = None
    verify: Verify = "auto"

    def __post_init__(self):
        if not os.path.isdir(self.place.directory):
            raise ValueError(f"{self.save_dir}: no such directory; expected the save_dir of a run of gpt_pretrain.main")
        _ = self._given

    @functools.cached_property
    def data(self):
        """Plan, directories and length of the run."""
        with self.place.named():
            return open_run(self.place.directory)

    @functools.cached_property
    def place(self) -> Place:
        """The `save_dir`, and where its files are on this machine."""
        return run_at(self.save_dir)

    @property
    def plan(self):
        return self.data.plan

    @functools.cached_property
    def ledger(self) -> Ledger:
        """What the run has consumed; empty before its first save. ValueError where it is not this run's."""
        directory = self.place.directory
        with self.place.named():
            written = Path(directory, ledger_lib.FILE_NAME).exists()
            ledger = Ledger.read(directory) if written else Ledger()
            self.data.check_ledger(ledger)
        return ledger

    def index_of(self, update: int, option: str = "--step") -> int:
        """Number of an update, from 1 -> its index in the plan, from 0. ValueError outside the run."""
        if not 1 <= update <= self.data.num_steps:
            raise ValueError(f"{option} {update}: {self.save_dir} has the updates 1 to {self.data.num_steps}")
        return update - 1

    def streams(self) -> list[Stream]:
        """Every stream of any stage, once for each dataset that has its name; then those that documents were inserted
        from."""
        found = {(each.name, each.fingerprint): each for part in self.plan.stages for each in part.streams}
        others = {(each.name, each.fingerprint): each for part in self.plan.stages for each in part.read_from}
        return [*found.values(), *(each for key, each in others.items() if key not in found)]

    def directory(self, stream: Stream) -> str:
        """Where a stream's dataset is. ValueError if that is not known or nothing is there."""
        given = self._given[stream.name]
        recorded = [*map(self.data.directories.get, (stream.fingerprint, stream.name))]
        is_forked = sum(each.name == stream.name for each in self.streams()) > 1  # one name, several datasets
        found = [*given, *recorded] if is_forked or not given else given
        places = list(dict.fromkeys(each for each in found if each is not None))
        same = [each for each in places if len(places) > 1 and _fingerprint_at(each) == stream.fingerprint]
        directory = next(iter(same or places), None)
        advice = f"Say where it is now: --data_dir {stream.name + '=' if stream.name else ''}DIR."
        if directory is None:
            raise ValueError(f"{self.save_dir}: does not say where the dataset of stream {stream.name!r} is. {advice}")
        if not (is_bucket(directory) or os.path.isdir(directory) or glob.glob(directory)):
            raise ValueError(f"{directory}: not there, seen from {os.getcwd()}. {advice}")
        return directory

    def dataset(self, stream: Stream) -> TokenDataset:
        """A stream's dataset. ValueError if it is not the one that the run was trained on."""
        dataset = self._cached("dataset", stream, lambda directory: open_dataset(directory, verify=self.verify))
        if (found := dataset.splits["train"].num_tokens) != stream.num_tokens:
            raise ValueError(
                f"{dataset.directory}: has {found} training tokens, the plan of {self.save_dir} {stream.num_tokens}"
            )
        return dataset

    def sources(self, stage: Stage) -> dict[str, TokenSource]:
        """What the rows of a stage are read from, by name."""
        return {stream.name: self.dataset(stream).splits["train"] for stream in stage.read_from}

    def manifest(self, stream: Stream) -> manifest_lib.Manifest | None:
        """Of a stream's dataset; None for bare .bin shards, which have none."""
        if stream.fingerprint.startswith("bare-"):
            return None
        return self._cached("manifest", stream, manifest_lib.load)

    def documents(self, stream: Stream, split: str = "train") -> DocumentTables | None:
        """The documents of a stream; None where nobody recorded them, or there is no such split."""
        manifest = self.manifest(stream)
        if manifest is None or split not in manifest.splits:
            return None
        return self._cached(split, stream, lambda directory: DocumentTables(directory, split, manifest))

    def tokenizer(self, stream: Stream) -> Tokenizer:
        """What turns a stream's ids into text; where nobody recorded it, the user's, or GPT-2's."""
        manifest, name = self.manifest(stream), self.tokenizer_name

        def make(directory: str) -> Tokenizer:
            if manifest is None:
                return user_tokenizer(name or "gpt2")
            return dataset_tokenizer(manifest.spec, directory, name)

        return self._cached("tokenizer", stream, make)

    @functools.cached_property
    def _given(self) -> dict[str, list[str]]:
        """`data_dirs` by name of the stream."""
        names = {stream.name for stream in self.streams()}
        alone = [name for name in names if not name.startswith(INSERTED)]
        given: dict[str, list[str]] = {name: [] for name in names}
        for value in self.data_dirs:
            name, is_named, directory = value.partition("=")
            if is_named and name in names:
                given[name].append(directory)
            elif len(alone) == 1:
                given[alone[0]].append(value)
            else:
                expected = ", ".join(f"{name}=DIR" for name in sorted(names))
                raise ValueError(f"--data_dir {value}: the run has several streams; expected some of {expected}")
        return given

    @functools.cached_property
    def _opened(self) -> dict:
        return {}

    def _cached(self, kind: str, stream: Stream, make):
        key = kind, stream.name, stream.fingerprint
        if key not in self._opened:
            directory = self.directory(stream)
            made = make(directory)
            found = getattr(made, "fingerprint", stream.fingerprint)
            if found != stream.fingerprint:
                raise ValueError(
                    f"{directory}: has the fingerprint {found:.16}, but {self.save_dir} was trained on "
                    f"{stream.fingerprint:.16}. Say where that dataset is now: --data_dir."
                )
            self._opened[key] = made
        return self._opened[key]


def _fingerprint_at(directory: str) -> str | None:
    """Of the dataset that is there, if one is."""
    try:
        if is_bucket(directory) or Path(directory, manifest_lib.MANIFEST_NAME).exists():
            return manifest_lib.load(directory).fingerprint
        return open_dataset(directory, verify="size").fingerprint
    except ValueError:
        return None
