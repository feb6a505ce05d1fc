"""The doors between rooms that import-linter's contracts (pyproject.toml, `make lint`) do not see."""

import graphlib
import pathlib
import tomllib

import grimp
import pytest

REPO = pathlib.Path(__file__).parent.parent
PACKAGES = ("data_prep", "gpt_pretrain")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import statement of both packages: at the top, in functions, under TYPE_CHECKING."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def ancestors(module: str) -> set[str]:
    """a.b.c -> {a, a.b}"""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def test_no_modules_import_each_other_in_a_circle(graph):
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    for module, imported in imports.items():  # who imports a.b from outside runs a/__init__.py first
        imported |= {package for each in imported for package in ancestors(each) - ancestors(module) - {module}}
    problem = ""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        problem = " <- ".join(error.args[1])
    assert not problem


def test_the_contracts_know_every_command_line():
    with open(REPO / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (protected,) = [each["protected_modules"] for each in contracts if "no command line" in each["name"]]
    found = set()
    for package in PACKAGES:
        for path in (REPO / package).rglob("*.py"):
            is_run_by_users = "\ndef make_parser(" in path.read_text(encoding="utf-8")
            if is_run_by_users and path.name != "__main__.py":
                found.add(".".join(path.relative_to(REPO).with_suffix("").parts))
    assert found == {name for name in protected if "*" not in name}
