"""The walk-through of docs/counterfactual.md, command by command, as a reader would type it."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from support.printed_commands import REPO
from support.training_runs import environment

PAGE = REPO / "docs" / "counterfactual.md"
FENCE = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_page_works_and_prints_what_the_page_says(tmp_path):
    shutil.copytree(REPO / "configs", tmp_path / "configs")
    commands, shown = [], []
    for block in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        lines = block.splitlines()
        if lines[0].startswith("python "):
            commands += [shlex.split(line, comments=True) for line in lines]
        else:
            shown += [re.sub(r"\(?[-+]?\d+\.\d+\)?", "NUMBER", line) for line in lines]
    assert len(commands) >= 9 and len(shown) >= 10
    printed = ""
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=tmp_path,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert done.returncode == 0, (command, done.stdout[-3000:])
        printed += done.stdout
    # Losses may differ in their last digits from one processor to another; steps, places and verdicts may not.
    lines = [re.sub(r"\(?[-+]?\d+\.\d+\)?", "NUMBER", line) for line in printed.splitlines()]
    assert not [line for line in shown if line not in lines]
    for name in (
        "exposures.parquet",
        "answers/without/index.html",
        "answers/without/result.json",
        "answers/subsets/effects.parquet",
        "answers/subsets/members.parquet",
        "memorization.html",
        "ablations.html",
        "ablations.png",
    ):
        assert (tmp_path / name).stat().st_size > 500, name
