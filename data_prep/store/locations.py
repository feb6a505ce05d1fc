"""Where files live: paths and URLs, through fsspec.

Local paths, https://, hf://, gs://, s3://. Files that ship with the package are spelled `embedded://name`, so that
they have the same path on every machine.
"""

import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_prep.store.bucket_clients import input_file_system
from data_prep.store.secrets import hide_secrets, whole_url

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = "embedded://"
BUCKETS = ("gs://", "gcs://", "s3://")
NETWORK_TIMEOUT_SECS = 10
SILENCE_SECS = 60  # of a server, after which it is given up


class InputError(ValueError):
    """An input file that cannot be used; the message starts with its path."""


class DamagedInput(InputError):
    """An input file that a good copy would mend: cut short, or with bytes changed."""


def check_reachable(path: str) -> None:
    """InputError, soon, when a hf:// path is asked for without network.

    The Hub's own client retries for minutes before it says so.
    """
    if not path.startswith("hf://"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_SECS).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        dataset = "/".join(path.removeprefix("hf://datasets/").split("/")[:2])
        folder, name = os.path.split(path.removeprefix(f"hf://datasets/{dataset}/"))
        inside = f"{folder}/" if folder else ""
        suffix = os.path.splitext(name)[1]
        raise InputError(
            f"{path}: no network ({endpoint} cannot be reached: {describe(error)}). On a machine "
            f"with network, download it by `hf download {dataset} --repo-type=dataset "
            f"--include='{inside}*' --local-dir=fineweb`, then here use "
            f"--input='fineweb/{inside}*{suffix}'."
        ) from None


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether it is the URL of something in a bucket, where we write, too.

    >>> is_bucket("gs://b/a"), is_bucket("s3://b"), is_bucket("b/a"), is_bucket("https://h/a")
    (True, True, False, False)
    """
    return os.fspath(path).startswith(BUCKETS)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of another machine."""
    return "://" in path and not path.startswith((EMBEDDED, "file://"))


def file_name(path: str) -> str:
    """Last part of a path or URL, without the URL's query.

    >>> file_name("https://example.org/a/b.bin?download=true"), file_name("a/c.bin")
    ('b.bin', 'c.bin')
    """
    return os.path.basename(urllib.parse.urlsplit(path).path if is_remote(path) else path)


def readable_error(path: str, error: BaseException) -> InputError:
    """The error for a file that cannot be opened, or fails while it is read, which nothing says is damaged."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file")
    if isinstance(error, PermissionError) and not is_remote(path):
        return InputError(
            f"{path}: cannot be read: permission denied. Let this user read it (`chmod u+r` by its owner)"
        )
    if isinstance(error, OSError) and error.strerror and not is_remote(path):
        return InputError(f"{path}: cannot be read: {error.strerror}")
    return InputError(f"{path}: cannot be read: {describe(error)}")


def file_info(path: str) -> dict[str, Any]:
    """What the file system says of a file: `size` (None if unknown) and its own keys.

    Raises InputError: no such file, or it cannot be read.
    """
    try:
        file_system, inner = file_system_of(path)
        return cast(dict[str, Any], file_system.info(inner))
    except Exception as error:  # each file system raises its own types
        raise readable_error(path, error) from None


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading, with seek, wherever it is."""
    file_system, inner = file_system_of(path)
    if not is_remote(path):
        return cast(BinaryIO, file_system.open(inner, "rb"))
    # The columns of a parquet file are read in turns: several blocks must stay in memory.
    options = {"block_size": 4 << 20, "cache_type": "blockcache", "cache_options": {"maxblocks": 8}}
    file = cast(Any, file_system.open(inner, "rb", **options))
    if path.startswith(("http://", "https://")):
        try:
            file.seek(max(0, (file.size or 0) - 1))
            file.read(1)
            file.seek(0)
        except (ValueError, OSError, TypeError):  # a server that only sends whole files
            whole = tempfile.TemporaryFile()  # noqa: SIM115
            with file_system.open(inner, "rb", block_size=0) as stream:
                while piece := cast(bytes, stream.read(1 << 20)):
                    whole.write(piece)
            whole.seek(0)
            return cast(BinaryIO, whole)
    return file


def download(path: str, target: str | os.PathLike, received: Callable[[int], None]) -> None:
    """Copies a file of the Hub or a web server, and says how many more bytes are there as they come.

    `buckets.download` is the one for buckets.

    Raises InputError: the file is not there, or does not arrive to its end.
    """
    import fsspec

    class Received(fsspec.Callback):
        def relative_update(self, inc: int = 1) -> None:
            received(inc)

    try:
        file_system, inner = file_system_of(path)
        if path.startswith("hf://"):
            # With a callback it would read the file block by block, which is slow.
            file_system.get_file(inner, os.fspath(target))
            received(os.path.getsize(target))
        else:
            file_system.get_file(inner, os.fspath(target), callback=Received())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # each file system raises its own types
        raise InputError(f"{path}: cannot be downloaded: {describe(error)}") from error


def file_system_of(path: str) -> tuple[Any, str]:
    import fsspec.core

    path = whole_url(path)
    if path.startswith(EMBEDDED):
        path = str(ASSETS / path.removeprefix(EMBEDDED))
    if is_bucket(path):
        return input_file_system(path)
    if not path.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(path)
    import aiohttp

    # By itself it ends every transfer after five minutes, however well it goes.
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECS)
    return fsspec.core.url_to_fs(path, client_kwargs={"timeout": timeout})


def describe(error: BaseException) -> str:
    """An exception of a foreign library in one line."""
    text = hide_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
