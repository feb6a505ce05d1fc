"""Files of a prepared dataset as files of this machine, wherever the dataset lies."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from data_prep.store import buckets
from data_prep.store.block_cache import BlockCache, default_folder
from data_prep.store.files import digest_json, require_whole
from data_prep.store.manifest import MANIFEST_NAME, Shard
from data_prep.store.secrets import public_name


def default_cache() -> BlockCache:
    """Of who did not say which: in the user's cache folder."""
    return _cache_in(default_folder())


@functools.lru_cache(maxsize=1)
def _cache_in(folder: str) -> BlockCache:
    return BlockCache(folder)


def local_file(directory: str | os.PathLike, shard: Shard, cache: BlockCache | None = None) -> Path:
    """Where a file of a dataset can be read: in its directory, or, of a bucket, in the cache, once it is all there.

    Raises ValueError where it cannot be fetched. A file of a directory may be anything: see `require_whole_file`.
    """
    if not buckets.is_bucket(directory):
        return Path(directory, shard.name)
    url = buckets.join(os.fspath(directory), shard.name)
    return (cache or default_cache()).get(
        "files",
        shard.digest,
        shard.num_bytes,
        lambda partial: buckets.download(url, partial),
        what=url,
        advice="Upload it again from a copy that `python -m data_prep.check` finds good.",
    )


def require_whole_file(directory: str | os.PathLike, shard: Shard, cache: BlockCache | None = None) -> Path:
    """`local_file`, after comparing it with its size and digest. ValueError where it is another one."""
    path = local_file(directory, shard, cache)
    if not buckets.is_bucket(directory):  # what the cache holds was compared
        require_whole(path, shard.num_bytes, shard.digest)
    return path


def reaches(url: str) -> bool:
    """Whether there is a prepared dataset in a bucket, and this machine may read it."""
    try:
        return buckets.stat(buckets.join(url, MANIFEST_NAME)) is not None
    except ValueError:
        return False


def local_folder_with(url: str, name: str) -> Path:
    """A folder of this machine with a copy of the object `name` below the URL; without it where there is none.

    Nobody has recorded its digest: each process fetches it, and must compare what it says.

    Raises ValueError where it cannot be fetched.
    """
    folder, source = Path(_temporary_folder(), digest_json([url, name])), buckets.join(url, name)
    folder.mkdir(exist_ok=True)
    if buckets.stat(source):
        buckets.download(source, folder / name)
    return folder


@functools.lru_cache(maxsize=1)
def _temporary_folder() -> str:
    """Gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="gpt_pretrain-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def whereabouts(directory: str) -> str:
    """A directory so that it is understood from anywhere: its absolute path, or its URL as far as it is public.

    >>> whereabouts("gs://bucket/data")
    'gs://bucket/data'
    """
    return public_name(directory) if buckets.is_bucket(directory) else os.path.abspath(directory)
