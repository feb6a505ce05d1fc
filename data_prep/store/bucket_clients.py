"""gcsfs and s3fs, each set up the one way that this project uses it, and the event loop on which they run.

STORAGE_EMULATOR_HOST (without credentials then) and AWS_ENDPOINT_URL[_S3] lead to other servers than Google's and
Amazon's.
"""

import asyncio
import importlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from data_prep.store.bucket_settings import connect_secs, patience_secs, silence_secs

T = TypeVar("T")

# What a client is made of: when one of these changes there has to be another.
_VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def input_file_system(url: str) -> tuple[Any, str]:
    """For inputs, which fsspec reads by itself: the same servers, credentials and timeouts, with its own retries.

    Returns the file system and the path in it. ImportError: the extra is missing.
    """
    import fsspec.core

    if url.startswith("s3://"):
        check_installed("s3")
        return fsspec.core.url_to_fs(url, **s3_options())
    check_installed("gcs")
    if not _has_emulator():
        return fsspec.core.url_to_fs(url, **gcs_options())
    from gcsfs.core import GCSFileSystem  # the registered one asks Google by gRPC, which no variable leads elsewhere

    return GCSFileSystem(**gcs_options()), url.partition("://")[2]


def gcs_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_secs(), sock_read=silence_secs())
    options: dict[str, Any] = {"session_kwargs": {"timeout": timeout}}
    if _has_emulator():
        options["token"] = "anon"
    return options


def _has_emulator() -> bool:
    return os.environ.get("STORAGE_EMULATOR_HOST", "") not in ("", "default")  # as gcsfs reads it


def s3_options(**config: Any) -> dict[str, Any]:
    return {"config_kwargs": {"connect_timeout": connect_secs(), "read_timeout": silence_secs(), **config}}


class _Clients:
    """One client a store. A fork's child makes its own: sockets, locks and the loop's thread are its parent's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: dict[tuple, Any] = {}
        self.of_parents: list[dict] = []

    def after_fork(self) -> None:
        self.lock = threading.Lock()  # a thread that is not here may have held it
        # Kept, so that none is finalized here: it would close sockets on a loop that does not run.
        self.of_parents.append(self.made)
        self.made = {}


_clients = _Clients()
os.register_at_fork(after_in_child=_clients.after_fork)


def check_installed(extra: str) -> None:
    """ImportError, with what to do, where the extra gcs or s3 is missing."""
    try:
        importlib.import_module(f"{extra}fs")
    except ImportError as error:
        raise ImportError(f"needs {extra}fs ({error}). Install it: `pip install 'gpt-pretrain[{extra}]'`") from None


def gcs_client() -> Any:
    """gcsfs without its gRPC part. ImportError: the extra is missing."""
    check_installed("gcs")
    from gcsfs.core import GCSFileSystem

    return _client(GCSFileSystem, gcs_options)


def s3_client() -> Any:
    """s3fs which tries once, and leaves digests to us. ImportError: the extra is missing."""
    check_installed("s3")
    from s3fs import S3FileSystem

    return _client(
        S3FileSystem,
        lambda: s3_options(
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=64,
            request_checksum_calculation="when_required",  # we send an MD5, which every S3-like store checks
            response_checksum_validation="when_required",
        ),
    )


def _client(kind: Any, options: Any) -> Any:
    key = (kind, patience_secs(), *map(os.environ.get, _VARIABLES))
    with _clients.lock:
        if key not in _clients.made:
            _clients.made[key] = kind(skip_instance_cache=True, use_listings_cache=False, **options())
        return _clients.made[key]


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Starts it on the loop that fsspec runs in a thread of its own, a new one in each process."""
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(work, get_loop())


def wait_for(future: Future[T]) -> T:
    """Its result. An interrupt of this thread ends the work, too."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
