"""docs/faults.md names tests that are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_the_page_of_faults_names_is_there():
    page = (TESTS.parent / "docs" / "faults.md").read_text()
    named = re.findall(r"`(test_\w+)::(test_\w+)`", page)
    assert len(named) > 40
    for file, test in named:
        assert f"def {test}(" in (TESTS / f"{file}.py").read_text(), f"{file}::{test}"
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| Fault")]
    assert all("::" in row for row in rows)
