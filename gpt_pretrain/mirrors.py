"""A directory of this machine that stands for one in a bucket.

    <directory>/.mirror.json    which objects are there as which files: size, version in the bucket, time of the file

With it, a file that is in the bucket already is not sent again, and one that is here already is not fetched again.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from data_prep.pages.numbers import percent, size_text
from data_prep.store import buckets
from data_prep.store.files import read_note, write_note
from data_prep.store.typed import Count, typed

INDEX = ".mirror.json"
VERSION = 1
AT_ONCE = 8
SMALL_BYTES = 16 << 20  # up to here a file that may be written to meanwhile is read as a whole
SAY_SECS = 10.0

Objects = Mapping[str, buckets.Object]  # by their names below the directory


@dataclasses.dataclass(frozen=True)
class Place:
    """Where something is.

    Attributes:
      name: as its user knows it: a path, or a URL in a bucket.
      directory: where its files are on this machine.
    """

    name: str
    directory: str

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """What a ValueError says of the directory is said of the name."""
        try:
            yield
        except ValueError as error:
            said = str(error).replace(self.directory, self.name)
            if said == str(error):
                raise
            raise ValueError(said) from error


def folder_in_cache(kind: str, url: str) -> str:
    """The user's folder for one URL: .../gpt_pretrain/runs/best-0f3a...

    XDG_CACHE_HOME names another cache than ~/.cache.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return os.path.join(root, "gpt_pretrain", kind, f"{url.rpartition('/')[2]}-{digest}")


@dataclasses.dataclass(frozen=True)
class Copy:
    """An object and the file that has its content, as both were when it was copied."""

    num_bytes: Count
    version: str
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    content: bytes
    copy: Copy


class Mirror:
    """Objects below `url` and files in `directory`. Any thread may call everything.

    Raises ValueError: the directory stands for another URL.

    Attributes:
      num_bytes_moved: to and from the bucket so far.
    """

    def __init__(self, url: str, directory: str | os.PathLike):
        self.url, self.directory = url, Path(directory)
        self.num_bytes_moved = 0
        self._lock = threading.Lock()
        self._copies = self._read_index()

    def _read_index(self) -> dict[str, Copy]:
        fields = read_note(self.directory / INDEX) or {}
        try:
            url, copies = fields.get("url"), typed(Mapping[str, Copy], fields.get("copies", {}), "copies")
        except ValueError:
            return {}
        if url not in (None, self.url):
            raise ValueError(f"{self.directory}: stands for {url}; choose another directory for {self.url}")
        return dict(copies) if fields.get("version") == VERSION else {}

    @property
    def is_new(self) -> bool:
        """Nothing says that the directory stands for the URL."""
        return not (self.directory / INDEX).exists()

    def save_index(self) -> None:
        with self._lock:
            copies = {name: dataclasses.asdict(copy) for name, copy in self._copies.items()}
        fields: dict[str, Any] = {"version": VERSION, "url": self.url, "copies": copies}
        write_note(self.directory / INDEX, fields, durable=False)

    def path(self, name: str) -> Path:
        return self.directory / name

    def url_of(self, name: str) -> str:
        return buckets.join(self.url, name)

    def listing(self, below: str = "") -> dict[str, buckets.Object]:
        """What is in the bucket now. Names that no file of ours can have are left out."""
        found: dict[str, buckets.Object] = {}
        for each in buckets.list_objects(buckets.join(self.url, below) if below else self.url):
            name = each.url[len(self.url) + 1 :]
            if not any(part in ("", ".", "..") for part in name.split("/")) and "\0" not in name:
                found[name] = each
        return found

    def stat(self, names: Iterable[str]) -> dict[str, buckets.Object]:
        """Those of these objects that are in the bucket."""
        found = {name: buckets.stat(self.url_of(name)) for name in names}
        return {name: each for name, each in found.items() if each is not None}

    def is_as_left(self, listed: Objects) -> bool:
        """Whether these objects, and no others, are in the bucket as this mirror last saw or wrote them."""
        return {name: each.version for name, each in listed.items()} == {
            name: copy.version for name, copy in self._copies.items()
        }

    def has(self, name: str, listed: buckets.Object) -> bool:
        """Whether the file has the content of that object."""
        copy = self._copies.get(name)
        same = copy is not None and (copy.num_bytes, copy.version) == (listed.num_bytes, listed.version)
        return same and not self.is_changed(name)

    def is_changed(self, name: str) -> bool:
        """Whether the file has another content than the object has, as far as this mirror knows."""
        return self._copies.get(name, None) != self._copy_of(name, self._version_of(name))

    def _version_of(self, name: str) -> str:
        copy = self._copies.get(name)
        return "" if copy is None else copy.version

    def _copy_of(self, name: str, version: str, path: Path | None = None) -> Copy | None:
        try:
            status = os.stat(path or self.path(name))
        except OSError:
            return None
        return Copy(status.st_size, version, status.st_mtime_ns)

    def fetch(self, objects: Objects, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Makes files of objects, where they are not there already.

        Args:
          say: is told how far it is, every 10 seconds.

        Raises BucketError, OSError.
        """
        wanted = {name: each for name, each in objects.items() if not self.has(name, each)}
        total, began = sum(each.num_bytes for each in wanted.values()), self.num_bytes_moved
        self._at_once(
            [lambda name=name, each=each: self._fetch(name, each) for name, each in wanted.items()],
            lambda: say(
                f"Fetching {self.url}: {percent(self.num_bytes_moved - began, total)} of {size_text(total)} is here"
            ),
        )

    def _fetch(self, name: str, listed: buckets.Object) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        buckets.download(self.url_of(name), path, received=self._moved)
        if copy := self._copy_of(name, listed.version):
            with self._lock:
                self._copies[name] = dataclasses.replace(copy, num_bytes=listed.num_bytes)

    def upload_all(self, names: Iterable[str], *, source: Path) -> None:
        """Puts files of `source`, to which nobody writes, as objects, where they are not there already."""
        changed = [name for name in names if self._copies.get(name) is None or self.is_changed(name)]
        self._at_once([lambda name=name: self._upload(name, source) for name in changed])

    def _upload(self, name: str, source: Path) -> None:
        before = self._copy_of(name, "", source / name)
        written = buckets.upload(source / name, self.url_of(name))
        self._note(name, before or Copy(0, "", 0), written)

    def upload(self, name: str) -> None:
        """Puts a file, to which somebody may write meanwhile, as it is now. FileNotFoundError: it is gone."""
        before = self._copy_of(name, "")
        if before is None or before.num_bytes <= SMALL_BYTES:
            return self.write(name, self.snapshot(name))
        still = self.path(f".{Path(name).name}.upload")
        try:
            shutil.copyfile(self.path(name), still)
            self._note(name, before, buckets.upload(still, self.url_of(name)))
        finally:
            still.unlink(missing_ok=True)

    def snapshot(self, name: str) -> "Snapshot":
        """A file's content now. FileNotFoundError: it is gone."""
        before = self._copy_of(name, "")  # one that is written to meanwhile counts as changed
        content = self.path(name).read_bytes()
        return Snapshot(content, before or Copy(0, "", 0))

    def write(self, name: str, snapshot: "Snapshot") -> None:
        """Puts what was a file's content a moment ago."""
        self._note(name, snapshot.copy, buckets.write(self.url_of(name), snapshot.content))

    def _note(self, name: str, before: Copy, written: buckets.Object) -> None:
        with self._lock:
            self._copies[name] = Copy(written.num_bytes, written.version, before.mtime_ns)
        self._moved(written.num_bytes)

    def remove(self, name: str) -> None:
        """Removes an object; the file stays."""
        buckets.remove(self.url_of(name))
        self.forget(name)

    def remove_all(self, below: str) -> None:
        """Removes the objects of a folder; the files stay."""
        buckets.remove_all(self.url_of(below))
        for name in [each for each in self._copies if each.startswith(below + "/")]:
            self.forget(name)

    def forget(self, name: str) -> None:
        with self._lock:
            self._copies.pop(name, None)

    def _moved(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes_moved += num_bytes

    def _at_once(self, works: list[Callable[[], None]], say: Callable[[], None] = lambda: None) -> None:
        """Does all, some at a time; the first error ends it."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror") as pool:
            left, said = {pool.submit(each) for each in works}, time.monotonic()
            try:
                while left:
                    done, left = wait(left, 1.0, FIRST_EXCEPTION)
                    for each in done:
                        each.result()
                    if left and time.monotonic() - said > SAY_SECS:
                        said = time.monotonic()
                        say()
            finally:
                for each in left:
                    each.cancel()
