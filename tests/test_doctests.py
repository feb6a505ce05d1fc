"""Examples in docstrings that can run are run. (Not by `--doctest-modules`, which would import every module.)"""

import doctest
import importlib
import pathlib

import pytest

REPO = pathlib.Path(__file__).parent.parent


def modules_with_examples() -> list[str]:
    paths = [path for package in ("data_prep", "gpt_pretrain") for path in sorted((REPO / package).rglob("*.py"))]
    found = [path.relative_to(REPO).with_suffix("") for path in paths if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.parts).removesuffix(".__init__") for path in found]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_do_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for those that write files
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
