"""Prepared datasets in buckets, and the folder where copies of their files lie meanwhile."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.store import buckets, scratch


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL."""
    return {each.url[len(url) + 1 :]: buckets.read(each.url) for each in buckets.list_objects(url)}


def put_objects(url: str, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        buckets.write(f"{url}/{name}", content)


@pytest.fixture
def fresh_scratch(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where the scratch folder of this process is made: it has none yet."""
    where = tmp_path / "scratch"
    where.mkdir()
    monkeypatch.delenv("DATA_PREP_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(where))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scratch._folder.cache_clear()
    scratch._path.cache_clear()
    yield where
    scratch._folder.cache_clear()
    scratch._path.cache_clear()
