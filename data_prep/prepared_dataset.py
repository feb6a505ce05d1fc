"""A prepared dataset -> what convert needs of it, after looking at every byte."""

import shlex
from dataclasses import dataclass, replace
from typing import Any

from data_prep.agreement import confirm_complete
from data_prep.engines.engine import Engine, Report
from data_prep.options import Options
from data_prep.outcome import Outcome
from data_prep.pages.progress import Done, Progress
from data_prep.store.files import file_problem
from data_prep.store.manifest import DOCUMENTS, Manifest, load
from data_prep.store.places import join
from data_prep.store.spec import Spec
from data_prep.store.streams import StoredStream, stored_stream
from data_prep.writing import run_to_the_end

CHANGEABLE = ("formats", "bin_header", "shard_tokens", "record_tokens", "record_compression")


class PreparedDataset:
    """A prepared dataset, as something to convert.

    Args:
      changes: the values of CHANGEABLE that OUT shall have; the others stay what they are.
    """

    def __init__(self, directory: str, changes: dict[str, Any]):
        self._directory, self._manifest = directory, load(directory)
        spec = self._manifest.spec
        kept = {name: getattr(spec, name) for name in CHANGEABLE}
        options = Options(source=spec.source, val_tokens=0, **(kept | changes))
        self._spec = replace(spec, **{name: getattr(options, name) for name in CHANGEABLE})

    @property
    def num_tokens(self) -> int:
        """Of all splits."""
        return sum(split.num_tokens for split in self._manifest.splits.values())

    def confirm(self, output: str) -> Outcome:
        """The complete dataset in `output`; ValueError where it is another one."""
        return confirm_complete(output, self._spec, (), self._manifest.fingerprint)

    def spec(self, output: str) -> Spec:
        """The spec of the dataset in `output`: this one's, with the changes."""
        return self._spec

    def read(self, work: str, workers: Engine) -> tuple[dict[str, StoredStream], dict[str, StoredStream]]:
        """Of each split the tokens, and its documents: see `write_dataset`.

        Raises ValueError: a file is not what the manifest says. Names all of them.
        """
        format = self._manifest.spec.formats[0]
        jobs = [
            FileJob(join(self._directory, shard.name), shard.num_bytes, shard.digest)
            for shard in self._manifest.shards
            if shard.format in (format, DOCUMENTS)
        ]
        progress = Progress("verify", sum(job.num_bytes for job in jobs))
        try:
            run_to_the_end(verify, jobs, workers, progress)
        except ValueError as error:
            raise ValueError(f"{error}\n{self._advice()}") from error
        tokens, tables = (
            {split: stored_stream(self._directory, self._manifest, split, kind) for split in self._manifest.splits}
            for kind in (format, DOCUMENTS)
        )
        return tokens, tables

    def finish(self, manifest: Manifest) -> Manifest:
        """The manifest with its sources, as the stream was made from the same text.

        Raises ValueError: what was read is not the stream that this dataset's manifest describes.
        """
        for name, expected in self._manifest.splits.items():
            if manifest.splits[name] != expected:
                raise ValueError(
                    f"{self._directory}: split {name} is {manifest.splits[name]}, expected "
                    f"{expected}.\n{self._advice()}"
                )
        return replace(manifest, sources=self._manifest.sources)

    def _advice(self) -> str:
        return (
            f"Restore what is damaged (`python -m data_prep.check {shlex.quote(self._directory)}` looks at all "
            "of it), then run the same command again."
        )


@dataclass(frozen=True)
class FileJob:
    path: str
    num_bytes: int
    digest: str


def verify(job: FileJob, report: Report) -> None:
    """ValueError unless the file is what the manifest says."""
    if problem := file_problem(job.path, job.num_bytes, job.digest):
        raise ValueError(str(problem))
    report(Done(text_bytes=job.num_bytes, work=job.num_bytes))
