"""hf://ID -> a folder on this machine, by huggingface_hub's client and in its cache."""

import re
from pathlib import Path

from data_prep.store.locations import describe

_URL = re.compile(r"hf://(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_WANTED = ["config.json", "model*.safetensors", "model*.safetensors.index.json"]


def is_hub(source: str) -> bool:
    return source.startswith("hf://")


def check_url(name: str, url: str) -> str:
    """ValueError for what names no model of the Hub."""
    if not _URL.fullmatch(url):
        raise ValueError(
            f"{name}: found {url!r:.200}, expected a model's id, as in hf://gpt2 or hf://OWNER/NAME@REVISION"
        )
    return url


def folder_of(url: str) -> Path:
    """The model's config and safetensors, downloaded unless they are in the cache (HF_HOME).

    Raises ValueError where they are not to be had.
    """
    from huggingface_hub import snapshot_download

    match = _URL.fullmatch(url)
    assert match, "check_url refuses it"
    try:
        return Path(snapshot_download(match["id"], revision=match["revision"], allow_patterns=_WANTED))
    except Exception as error:  # the client's own, and those of its HTTP library
        raise ValueError(
            f"{url}: cannot be downloaded ({describe(error):.400}). Is the id right, and is there a network? Else "
            f"fetch it on another machine, `hf download {match['id']} --local-dir=DIR`, and name that folder."
        ) from None
