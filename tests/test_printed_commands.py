"""Every command that a page, a card, `--help`, a message or a finished run tells its reader to type can be typed."""

import html
import importlib
import re
from types import SimpleNamespace

import pytest
from support.inspected_run import prepare
from support.printed_commands import (
    REPO,
    all_flags,
    command_lines,
    commands_in,
    commands_in_python,
    documents,
    flags_in,
    missing_in,
    problem_with,
    problem_with_settings,
    settings_in,
    texts_of,
)

from data_prep import convert
from data_prep.outcome import Outcome, summary
from data_prep.store.manifest import load
from gpt_pretrain.train.report import say_where_things_are
from gpt_pretrain.train.time_ledger import TimeLedger


def wrong(commands: list[str]) -> dict[str, str]:
    """What is wrong with which of them."""
    assert commands, "no command was found; does the text still print one?"
    return {command: problem for command in commands if (problem := problem_with(command))}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, str]:
    """The same small dataset in both formats and in one."""
    folder = tmp_path_factory.mktemp("datasets")
    found = {"bin,array_record": prepare(folder / "both")}
    for formats in ("bin", "array_record"):
        found[formats] = str(folder / formats)
        arguments = [found["bin,array_record"], found[formats], f"--formats={formats}", "--num_workers=1"]
        assert convert.main(arguments) == 0
    return found


@pytest.mark.parametrize("page", [str(path.relative_to(REPO)) for path in documents()])
def test_pages(page):
    commands = commands_in((REPO / page).read_text(encoding="utf-8"))
    assert not wrong([*commands, "make test"])  # not every page has one


@pytest.mark.parametrize("page", [str(path.relative_to(REPO)) for path in documents()])
def test_settings_and_flags_on_pages(page):
    text = (REPO / page).read_text(encoding="utf-8")
    problems = {binding: problem_with_settings(binding) for binding in settings_in(text)}
    assert not {binding: problem for binding, problem in problems.items() if problem}
    unknown = {flag for flag in flags_in(text) if not flag.startswith("--xla_")} - all_flags()
    assert not unknown


@pytest.mark.parametrize("page", [str(path.relative_to(REPO)) for path in documents()])
def test_files_and_names_on_pages(page):
    assert not missing_in((REPO / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", command_lines())
def test_help(module):
    parser = importlib.import_module(module).make_parser()
    assert parser.prog == f"python -m {module.removesuffix('.__main__')}"
    assert not wrong([parser.prog, *commands_in(texts_of(parser))])


@pytest.mark.parametrize("package", ["data_prep", "gpt_pretrain", "benchmarks"])
def test_messages_and_docstrings(package):
    problems = {}
    for path in sorted((REPO / package).rglob("*.py")):
        if path.parent.name != "card":  # puts its commands together from pieces; see test_cards
            problems |= wrong([*commands_in_python(path), "make test"])
    assert not problems


@pytest.mark.parametrize("formats", ["bin,array_record", "bin", "array_record"])
def test_cards(datasets, formats):
    with open(f"{datasets[formats]}/README.md") as markdown, open(f"{datasets[formats]}/card.html") as page:
        commands = commands_in(markdown.read())
        shown = commands_in(html.unescape(re.sub(r"<[^>]*>", "", page.read())))
    assert set(commands) <= set(shown)
    assert any("data_prep.convert" in command for command in commands) == ("," not in formats)
    assert not wrong(shown)


@pytest.mark.parametrize("source", ["sample", "sample-10BT"])
@pytest.mark.parametrize("was_complete", [False, True])
def test_the_line_that_preparing_ends_with(datasets, source, was_complete):
    outcome = Outcome(load(datasets["bin"]), was_complete)
    assert not wrong(commands_in(summary(outcome, source, datasets["bin"], 1.0)))


@pytest.mark.parametrize("step", [7, 10])
def test_the_lines_that_a_run_ends_with(capsys, tmp_path, step):
    command = "python -m gpt_pretrain.main --gin_file=configs/quickstart.gin --gin_param='optimizer.warmup_steps=3'"
    writers = ["console", "tensorboard"]
    config = SimpleNamespace(save_dir=str(tmp_path / "a run"), writers=writers, command=command)
    config.data, config.num_tokens = SimpleNamespace(check_epochs=lambda plan, num_steps: None), 1000
    plan = SimpleNamespace(position=lambda step_index: 8 * step_index, num_steps=lambda num_tokens: 20)
    built, start = SimpleNamespace(config=config, total_steps=10), SimpleNamespace(plan=plan)
    say_where_things_are(built, start, step, TimeLedger().summary())
    commands = commands_in(capsys.readouterr().out)
    assert len(commands) == 3
    assert not wrong(commands)


@pytest.mark.parametrize(
    "script",
    [
        "gpt-pretrain",
        "gpt-prepare",
        "gpt-check",
        "gpt-convert",
        "gpt-documents",
        "gpt-card",
        "gpt-generate",
        "gpt-inspect",
        "gpt-replay",
        "gpt-report",
        "gpt-export",
    ],
)
def test_console_scripts(script):
    assert not wrong([script, f"{script} --help"])


@pytest.mark.parametrize(
    "text",
    [
        "`python -m data_prep.fineweb --inputs=sample`",
        '`python -m data_prep.convert "$DATA" --to=bin`',
        "`python -m data_prep.nothing DIR`",
        "`data_prep.fineweb --format=bin`",
        "(`python -m gpt_pretrain.inspect\nRUN --step N --json`)",
        "```\n  again:   .venv/bin/python -m gpt_pretrain.replay RUN --step=3   (a comment)\n```",
        "`python -m gpt_pretrain.main --gin_file=configs/gpt5.gin`",
        "`python -m gpt_pretrain.main --gin_param='optimizer.warmup = 3'`",
        "`python -m gpt_pretrain.main --gin_param='optimiser.lr = 3'`",
        "`python benchmarks/step.py --config gpt5`",
        "`python benchmarks/step.py --stepz 3`",
        "`python benchmarks/nothing.py`",
        "`make tests`",
        "```\nmake tests  # all of them\n```",
        "`gpt-train --gin_file=configs/quickstart.gin`",
        "`gpt-check DIR --fix`",
        "`pip install -e '.[gpu]'`",
        "`pip install tensorbored`",
        "`pip install -e . -c versions.txt`",
    ],
)
def test_a_wrong_command_is_noticed(text):
    assert len(wrong(commands_in(text))) == 1


def test_a_wrong_setting_or_flag_is_noticed():
    text = "`model.n_layers = 6`\n\n```\ndata.shuffled = True\n```\n\n`--rows 3 --colums 4`"
    assert all(problem_with_settings(each) for each in settings_in(text))
    assert len(settings_in(text)) == 2
    assert set(flags_in(text)) - all_flags() == {"--colums"}


def test_a_missing_file_or_name_is_noticed():
    there = "`data_prep/store/` `docs/data.md` `data_prep.convert` `data_prep.store.manifest.load`"
    assert not missing_in(there)
    assert missing_in(
        "`docs/nothing.md` `gpt_pretrain/nothing/x.py` `data_prep.store.manifest.nothing` `data_prep.nothing`"
    )


def test_commands_are_found_in_strings_of_programs(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("raise ValueError(f'{path}: run `python -m data_prep.check {path} '\n    f'--mend {1}` first')\n")
    assert commands_in_python(path) == ["python -m data_prep.check 111 --mend 111"]
    assert wrong(commands_in_python(path))
