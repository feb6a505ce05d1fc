"""Small damage to files, by chance from a seed: bits, cuts, insertions, and other values in JSON that is still JSON."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.store.files import digest_json

ODD_VALUES = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**53, 2**64, 10**400, 1.5, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd",
    "os:abort", "a\x1b[2J", "\u202e", "\ud800", [], {}, [[]], {"x": 1}, ["a"], "9" * 400,
)  # fmt: skip


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """Never the same."""
    out = bytearray(content)
    match rng.randrange(6 if content else 1):
        case 0:
            place = rng.randrange(len(out) + 1)
            out[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        case 1:
            del out[rng.randrange(len(out)) :]
        case 2:
            place = rng.randrange(len(out))
            del out[place : place + rng.choice((1, 8, 100))]
        case _:
            for _ in range(rng.choice((1, 1, 1, 8))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out) if out != content else bytes(out) + b"\0"


def json_changed(content: bytes, rng: random.Random, *, signed: bool) -> bytes:
    """One value somewhere is another, missing or new; `signed` makes the file's own digest agree: a forger's file."""
    fields = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        for key in keys:
            if (value is fields and key == "digest") or (isinstance(value, list) and key > 40):
                continue
            places.append((value, key))
            visit(value[key])

    visit(fields)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("x", "path", "../x", "a\x1b"))] = rng.choice(ODD_VALUES)
        case 2 if isinstance(holder, list):
            holder.append(holder[key])
        case 3 if type(holder[key]) is int:
            holder[key] += rng.choice((-1, 1, 7, -1000, 10**6))
        case _:
            holder[key] = rng.choice(ODD_VALUES)
    if signed:
        fields.pop("digest", None)
        fields["digest"] = digest_json(fields)
    return json.dumps(fields).encode()


def with_file(path: Path, content: bytes, look: Callable[[], Any]) -> Any:
    """What `look` gives while the file holds something else."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        return look()
    finally:
        path.write_bytes(before)
