"""Finds the commands that texts tell their readers to type, and runs them through their parsers."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import pathlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from types import ModuleType

REPO = pathlib.Path(__file__).parent.parent.parent
UNKNOWN = "111"  # stands for what an f-string puts in: a number, a path or a name

_OURS = r"(?:data_prep|gpt_pretrain)(?:\.\w+)+"
_PYTHON = rf"(?:[\w./$-]*/)?python3? +(?:-m +{_OURS}|benchmarks/\w+\.py)"
_SCRIPT = r"(?:[\w./-]*/)?gpt-[a-z]+"
_PIP = r"(?:[\w./-]*/)?(?:python3? +-m +)?pip +install"
_MAKE = r"make +[a-z-]+"
_BARE = rf"{_OURS} +(?=--\w+=)"  # `data_prep.fineweb --input=...`, for short
_COMMAND = rf"(?:{_PYTHON}|{_PIP})(?![\w.-])"
_ANYWHERE = re.compile(rf"(?:^|(?<=\s)){_COMMAND}.*?(?=\s{{2}}|$)|(?<=\(){_COMMAND}[^)]*", re.MULTILINE)
_LINES = re.compile(rf"^[ $]*((?:{_SCRIPT}|{_MAKE})(?![\w./-]).*?)(?=\s{{2}}|$)", re.MULTILINE)
_SPANS = re.compile(rf"(?:{_PYTHON}|{_SCRIPT}|{_PIP}|{_MAKE}|{_BARE})(?![\w./])")
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_FOLDERS = ("benchmarks/", "configs/", "docs/", "tests/")
_BINDING = r"\s*(?:\w+/)?[a-z]+\.\w+ = "


def commands_in(text: str) -> list[str]:
    """The commands in `inline code` and in lines of their own, which end at two spaces, as before a comment."""
    fenced = [match.replace("\\\n", " ") for match in _FENCE.findall(text)]
    prose = _FENCE.sub("\n", text)
    spans = [" ".join(span.split()) for span in _SPAN.findall(prose)]
    found = [span for span in spans if _SPANS.match(span)]
    for block in (*fenced, _SPAN.sub("", prose)):
        found += [match.strip() for match in _ANYWHERE.findall(block)]
    for block in fenced:
        found += [match.strip() for match in _LINES.findall(block)]
    return found


def commands_in_python(path: pathlib.Path) -> list[str]:
    """The commands in the strings of a module: docstrings, messages, help. What f-strings put in is UNKNOWN."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else UNKNOWN for part in node.values]
            found.extend(commands_in("".join(parts)))
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.extend(commands_in(node.value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def texts_of(parser: argparse.ArgumentParser) -> str:
    """What `--help` shows, before it is broken into lines."""
    texts = [parser.description, parser.epilog, *(action.help for action in parser._actions)]
    return "\n\n".join(text for text in texts if text)


def command_lines() -> list[str]:
    """All modules of ours that a user runs by `python -m`."""
    names = []
    for package in ("data_prep", "gpt_pretrain"):
        for path in sorted((REPO / package).rglob("*.py")):
            if "\ndef make_parser(" in path.read_text(encoding="utf-8"):
                names.append(".".join(path.relative_to(REPO).with_suffix("").parts))
    return names


def problem_with(command: str) -> str:
    """Why the command cannot be what a user should type; "" where it can."""
    words = shlex.split(re.sub(r"\[any flag[^]]*\]", "", command), comments=True)
    words = [re.sub(r"^\[|^([^\[]*)\]$", r"\1", word) for word in words]  # [--optional 1]
    program = words[0].rpartition("/")[2]
    if program.startswith("python"):
        if words[1] == "-m" and words[2] == "pip":
            return _problem_with_pip(words[4:])
        if words[1] != "-m":
            return _problem_with_arguments(_benchmark(words[1]), words[2:])
        return _problem_with_arguments(_module(words[2]), words[3:])
    if program == "pip":
        return _problem_with_pip(words[2:])
    if program == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (REPO / "Makefile").read_text(), re.MULTILINE)
        return "" if set(words[1:]) <= set(targets) else f"the Makefile has {targets}"
    if program.startswith("gpt-"):
        scripts = _project()["scripts"]
        if program not in scripts:
            return f"pyproject.toml has {sorted(scripts)}"
        return _problem_with_arguments(importlib.import_module(scripts[program].partition(":")[0]), words[1:])
    return _problem_with_arguments(_module(words[0]), words[1:])


def _project() -> dict:
    with open(REPO / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


def _module(name: str) -> ModuleType | str:
    for candidate in (f"{name}.__main__", name):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(candidate)
    return f"no module {name}"


def _benchmark(path: str) -> ModuleType | str:
    if not (REPO / path).is_file():
        return f"no file {path}"
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), REPO / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _problem_with_pip(words: list[str]) -> str:
    project = _project()
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    names = {re.split(r"[\[<>=]", each)[0] for each in listed}
    options = iter(words)
    for word in options:
        if word in ("-c", "-r"):
            if not (REPO / (path := next(options))).is_file():
                return f"no file {path}"
        elif word.startswith((".", f"{project['name']}[")):
            if unknown := set(re.findall(r"[\w-]+", word)) - set(extras) - {project["name"], UNKNOWN}:
                return f"pyproject.toml has no extra {unknown}"
        elif not word.startswith("-") and word not in names:
            return f"{word} is no dependency of ours"
    return ""


def _problem_with_arguments(module: ModuleType | str, words: list[str]) -> str:
    if isinstance(module, str):
        return module
    if not hasattr(module, "make_parser"):
        return f"{module.__name__} has no make_parser()"
    if not words:
        words = ["..."]  # a name in a sentence, or a command without arguments: no matter which
    parser = module.make_parser()
    parser.allow_abbrev = False
    if "..." in words:  # "and so on"
        words = [word for word in words if word != "..."]
        for part in (*parser._actions, *parser._mutually_exclusive_groups):
            part.required = False
    words = [re.sub(r"^(--[\w.]+=)?(\.\.\.|[NAB])$", rf"\g<1>{UNKNOWN}", word) for word in words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            mixes = any(action.nargs == "+" and not action.option_strings for action in parser._actions)
            args = parser.parse_intermixed_args(words) if mixes else parser.parse_args(words)
    except SystemExit as stop:
        return said.getvalue().strip().splitlines()[-1] if stop.code else ""
    return _problem_with_gin(args) if hasattr(args, "gin_file") else ""


def _problem_with_gin(args: argparse.Namespace) -> str:
    """Files that are in configs/, bindings of parameters that there are."""
    from gpt_pretrain import flags, settings

    files = [file for file in args.gin_file if UNKNOWN not in file]
    for file in files:
        if not (REPO / file).is_file():
            return f"no file {file}"
    if getattr(args, "config", UNKNOWN) not in (UNKNOWN, *(path.stem for path in (REPO / "configs").glob("*.gin"))):
        return f"no configs/{args.config}.gin"
    try:
        settings.parse([str(REPO / file) for file in files], flags.bindings_of(args))
    except ValueError as error:
        return str(error)
    return ""


def documents() -> Iterator[pathlib.Path]:
    """The pages that people read."""
    yield from sorted(REPO.glob("*.md"))
    yield from sorted((REPO / "docs").glob("*.md"))
    yield REPO / "benchmarks" / "README.md"


def settings_in(text: str) -> list[str]:
    """Gin bindings in `inline code` and in blocks that begin with one, a block as one text."""
    blocks = [block for block in _FENCE.findall(text) if re.match(_BINDING, block.removeprefix("import my_module"))]
    spans = [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("\n", text))]
    return [*blocks, *(span for span in spans if re.match(_BINDING, span))]


def problem_with_settings(text: str) -> str:
    """Why gin does not take these bindings; "" where it does. A reader's own module is not there."""
    from gpt_pretrain import settings

    if "@my_" in text:
        return ""
    try:
        settings.parse([], [re.sub(r"^import my_module.*", "", text)])
    except ValueError as error:
        return str(error)
    return ""


def flags_in(text: str) -> list[str]:
    """The flags in `inline code` that begins with one: `--step N`, `--formats=bin`."""
    spans = [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("\n", text))]
    return [flag for span in spans if span.startswith("--") for flag in re.findall(r"(?:^|\s)(--[\w.-]+)", span)]


def all_flags() -> set[str]:
    """Of all our command lines, the benchmarks' included."""
    modules = [importlib.import_module(name) for name in command_lines()]
    for path in sorted((REPO / "benchmarks").glob("*.py")):
        module = _benchmark(str(path.relative_to(REPO)))
        assert isinstance(module, ModuleType)
        modules.append(module)
    parsers = [module.make_parser() for module in modules]
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


def missing_in(text: str) -> list[str]:
    """Files and Python names of ours in `inline code` that are not there: `docs/nothing.md`, `data_prep.nothing.f`."""
    spans = _SPAN.findall(_FENCE.sub("\n", text))
    paths = [path for span in spans for path in re.findall(r"^(?:[a-z_]+/)+[\w.-]*$", span)]
    ours = [path for path in paths if path.startswith(("data_prep/", "gpt_pretrain/", *_FOLDERS))]
    names = [span for span in spans if re.fullmatch(_OURS, span)]
    return [path for path in ours if not (REPO / path).exists()] + [name for name in names if not _is_there(name)]


def _is_there(name: str) -> bool:
    """A module, or something in one."""
    module, _, attribute = name.rpartition(".")
    if not isinstance(_module(name), str):
        return True
    return "." in module and hasattr(_module(module), attribute)
