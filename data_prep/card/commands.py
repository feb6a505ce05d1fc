"""Of a dataset card: what to type next."""

import re
import shlex
from collections.abc import Sequence

from data_prep.card.samples import Excerpt
from data_prep.outcome import training_flags
from data_prep.pages.blocks import Block, Code
from data_prep.store.manifest import Manifest
from data_prep.store.spec import FORMATS

# Nothing that a shell, or who reads the command, could take for something else.
_PLAIN_ID = re.compile(r"[<\w][\w:./<>-]{0,99}", re.ASCII)


def command_blocks(manifest: Manifest, excerpts: Sequence[Excerpt]) -> tuple[Block, ...]:
    """Commands for a shell; the first excerpt is the document that they look up."""
    spec = manifest.spec
    flags = " ".join(training_flags(manifest))
    run = "" if spec.source == "sample" else " --save_dir=runs/mine"
    lines = [
        "DATA=path/to/this/directory",
        "",
        "# train on it",
        f'python -m gpt_pretrain.main {flags} --data_dir="$DATA"{run}',
        "",
        "# verify every file",
        'python -m data_prep.check "$DATA"',
    ]
    if set(FORMATS) - set(spec.formats):
        command = f'python -m data_prep.convert "$DATA" "$DATA-both" --formats={",".join(FORMATS)}'
        lines += ["", "# write it again with the other format, too", command]
    if excerpts:
        split, row = excerpts[0].split, excerpts[0].row
        command = 'python -m data_prep.documents "$DATA"'
        lines += ["", "# which document holds a token of the stream, and its text"]
        lines.append(f"{command} --split={split} --token={row['start']} --text")
        if _PLAIN_ID.fullmatch(row["id"] or ""):
            lines += ["", "# where a document is", f"{command} --id {shlex.quote(row['id'])}"]
    return (Code("sh", "\n".join(lines)),)
