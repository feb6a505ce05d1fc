"""The programs on docs/other-trainers.md."""

import re

from support.training_runs import REPO


def program(heading: str) -> str:
    """The first program below a heading."""
    page = (REPO / "docs" / "other-trainers.md").read_text()
    return re.search(rf"^## {heading}\n.*?^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
