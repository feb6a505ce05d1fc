"""Which files a `--input` means, and opening them wherever they are.

Everything goes through fsspec: local paths, https://, hf://, gs://, s3://. Files that ship with
the package are spelled `embedded://name`, so that they have the same path on every machine.
Datasets of TFDS, `tfds:name`, are left to `tfds_input.py`.
"""

import glob
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

from data_prep.tokenizers import ASSETS

EMBEDDED = "embedded://"
TFDS = "tfds:"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
PRESET = re.compile(r"(edu-)?(?:sample-(\d+BT)|(CC-MAIN-\d{4}-\d{2}))")
SAMPLE_SIZES = ("10BT", "100BT", "350BT")
PRESETS = (
    "sample, sample-10BT, sample-100BT, sample-350BT, CC-MAIN-YYYY-WW, and the last four with "
    "edu- in front"
)
NETWORK_TIMEOUT_SECS = 10
SILENCE_SECS = 60  # of a server, after which it is given up


class InputError(ValueError):
    """An input file that cannot be used; the message starts with its path."""


class Preset(NamedTuple):
    patterns: str
    output_dir: str
    val_tokens: int


def find_preset(name: str) -> Preset | None:
    """The preset of this name, or None where `name` means files.

    sample-10BT -> hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet, data/fineweb-10BT
    """
    if name == "sample":
        return Preset(EMBEDDED + "sample.parquet", "data/sample", 100_000)
    match = PRESET.fullmatch(name)
    if not match:
        return None
    edu, size, crawl = match.groups()
    if size and size not in SAMPLE_SIZES:
        raise InputError(
            f"{name}: no such preset; FineWeb's samples are "
            + ", ".join(f"sample-{size}" for size in SAMPLE_SIZES)
        )
    dataset = "fineweb-edu" if edu else "fineweb"
    folder = f"sample/{size}" if size else f"data/{crawl}"
    return Preset(
        f"hf://datasets/HuggingFaceFW/{dataset}/{folder}/*.parquet",
        f"data/{dataset}-{size or crawl}",
        10_485_760,
    )


def expand(
    patterns: str, suffixes: tuple[str, ...] = SUFFIXES, presets: str = PRESETS
) -> list[str]:
    """Comma-separated paths, globs and URLs -> the files, in the order of the stream.

    A glob's files come sorted by name.

    Args:
      suffixes: how the names of the files may end.
      presets: what to suggest for a name that is no file.

    Raises InputError: nothing matches, a kind of file that cannot be read, a file named twice.
    """
    paths: list[str] = []
    for pattern in (piece.strip() for piece in patterns.split(",")):
        if not pattern:
            raise InputError(f"--input={patterns!r}: an empty name between commas")
        paths += _expand_one(pattern, presets)
    for path in paths:
        if path.startswith(TFDS) and suffixes == SUFFIXES:
            continue
        if not file_name(path).endswith(suffixes):
            raise InputError(
                f"{path}: unknown kind of file; expected a name ending in {', '.join(suffixes)}"
            )
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise InputError(f"{min(repeated)}: named more than once in --input={patterns!r}")
    return paths


def _expand_one(pattern: str, presets: str) -> list[str]:
    if pattern.startswith((EMBEDDED, TFDS)):
        return [pattern]
    if not is_remote(pattern):
        if os.path.isdir(pattern):
            raise InputError(f"{pattern}: is a directory; write {pattern.rstrip('/')}/*.parquet")
        if os.path.exists(pattern):  # also a name that contains [ or ?
            return [pattern]
        found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not found:
            problem = "no file matches" if glob.has_magic(pattern) else "no such file"
            raise InputError(f"{pattern}: {problem}{_did_you_mean_preset(pattern, presets)}")
        return found
    check_reachable(pattern)
    if "*" not in pattern:  # `?` and `[` are ordinary in a URL
        return [pattern]
    try:
        file_system, path = _file_system(pattern)
        found = sorted(cast(list[str], file_system.glob(path)))
    except Exception as error:  # each file system raises its own types
        raise InputError(f"{pattern}: cannot be listed: {describe(error)}") from error
    if not found:
        raise InputError(f"{pattern}: no file matches")
    return [file_system.unstrip_protocol(path) for path in found]


def _did_you_mean_preset(pattern: str, presets: str) -> str:
    return "" if re.search(r"[./*]", pattern) else f". The presets are {presets}"


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


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of another machine."""
    return "://" in path and not path.startswith((EMBEDDED, "file://"))


def file_name(path: str) -> str:
    """Last part of a path or URL, without the URL's query."""
    return os.path.basename(urllib.parse.urlsplit(path).path if is_remote(path) else path)


def file_info(path: str) -> dict[str, Any]:
    """What the file system says of a file: `size` (None if unknown) and its own keys.

    Raises InputError: no such file, or it cannot be read.
    """
    try:
        file_system, inner = _file_system(path)
        return cast(dict[str, Any], file_system.info(inner))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {describe(error)}") from error


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading, with seek, wherever it is."""
    file_system, inner = _file_system(path)
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
    """Copies a remote file, and says how many more bytes are there as they come.

    Raises InputError: the file is not there, or does not arrive to its end.
    """
    import fsspec

    class Received(fsspec.Callback):
        def relative_update(self, inc: int = 1) -> None:
            received(inc)

    try:
        file_system, inner = _file_system(path)
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


def _file_system(path: str) -> tuple[Any, str]:
    import fsspec.core

    if path.startswith(EMBEDDED):
        path = str(ASSETS / path.removeprefix(EMBEDDED))
    if not path.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(path)
    import aiohttp

    # By itself it ends every transfer after five minutes, however well it goes.
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECS)
    return fsspec.core.url_to_fs(path, client_kwargs={"timeout": timeout})


def describe(error: BaseException) -> str:
    """An exception of a foreign library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
