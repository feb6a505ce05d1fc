"""Remote .bin files -> copies on this machine."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data_prep.engines.engine import Report
from data_prep.pages.progress import Done
from data_prep.store import buckets
from data_prep.store.files import whole_file
from data_prep.store.locations import InputError, is_bucket
from data_prep.store.locations import download as download_file
from data_prep.store.places import is_file
from data_prep.store.scratch import local_copy
from data_prep.store.token_bin import Header, read_header


@dataclass(frozen=True)
class DownloadJob:
    path: str
    target: str
    size: int  # in bytes
    version: str  # sha256 of the file where the Hub says it
    layout: str  # see token_bin.LAYOUTS


def download(job: DownloadJob, report: Report) -> Header:
    """Puts a remote .bin file at `target`, unless it is there already.

    Raises InputError: it does not arrive, or is not what was listed or no .bin file.
    """
    if not is_file(job.target):

        def arrived(num_bytes: int) -> None:
            report(Done(text_bytes=num_bytes, work=num_bytes))

        with whole_file(job.target) as partial:
            if is_bucket(job.path):
                buckets.download(job.path, partial, received=arrived)
            else:
                download_file(job.path, partial, arrived)
            return _check_download(job, partial)
    report(Done(work=job.size))
    with local_copy(job.target) as path:
        return read_header(path, job.layout, called=job.path)


def _check_download(job: DownloadJob, partial: Path) -> Header:
    size = partial.stat().st_size
    if size != job.size:
        raise InputError(f"{job.path}: {size} bytes arrived, expected {job.size}")
    try:
        header = read_header(partial, job.layout, called=job.path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if len(job.version) == 64:
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != job.version:
            raise InputError(f"{job.path}: arrived with sha256 {found}, expected {job.version}")
    return header
