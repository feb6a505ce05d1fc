"""Every file of a dataset and of a run's data, damaged by chance: the answer is right, or one line that names the file.

The damage is by chance from fixed seeds. What a run needs beside the data, its checkpoints, is in other tests.
"""

import contextlib
import io
import random
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.damage import bytes_changed, json_changed, with_file
from support.inspected_run import prepare, simple_plan, stream, write_run

from data_prep import check, documents
from data_prep.store.datasets import open_dataset
from data_prep.store.documents import DocumentTables
from gpt_pretrain import inspect, replay
from gpt_pretrain.data.config import DataConfig

MAX_SECS, MAX_GROWTH_BYTES = 10, 1 << 30


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    dataset = prepare(folder / "data")
    run = write_run(folder / "run", {"": dataset}, simple_plan(stream(dataset)))
    return folder, Path(dataset), Path(run)


def command(main, *arguments: str) -> tuple[str, str]:
    """("said", output) of status 0, ("error", message) of another."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*arguments])
    message = err.getvalue() if main is not check.main else err.getvalue() + out.getvalue()
    return ("error", message) if status else ("said", out.getvalue())


def attempt(function) -> tuple[str, str]:
    """The same of a function that raises what a user can cause."""
    try:
        return "said", repr(function())
    except (ValueError, OSError) as error:
        return "error", f"error: {error}"


def looks_at(dataset: Path, run: Path) -> dict:
    """What people do with these files."""

    def read(format):
        source = open_dataset(str(dataset), format=format).splits["train"]
        return source.read(np.array([0, 4990, 7000]), 33).tolist()

    def excluded():
        config = DataConfig(dir=str(dataset), exclude=["<doc-50>", "<doc-77>"], seq_len=32)
        return config.stage(config.open(), ((0, 8),))

    return {
        "read bin": lambda: attempt(lambda: read("bin")),
        "read array_record": lambda: attempt(lambda: read("array_record")),
        "exclude": lambda: attempt(excluded),
        "between": lambda: attempt(lambda: list(DocumentTables(dataset).between(0, 9000))),
        "token": lambda: command(documents.main, str(dataset), "--token", "6001", "--text"),
        "id": lambda: command(documents.main, str(dataset), "--id", "<doc-60>"),
        "url": lambda: command(documents.main, str(dataset), "--url", "https://example.org/doc?i=66&q=<b>"),
        "check": lambda: command(check.main, str(dataset), "--num_workers=1"),
        "inspect seen": lambda: command(inspect.main, str(run), "--step", "7", "--full"),
        "inspect planned": lambda: command(inspect.main, str(run), "--step", "50", "--jsonl"),
        "inspect document": lambda: command(inspect.main, str(run), "--document", "<doc-60>"),
        "replay": lambda: command(replay.main, str(run), "--verify", "--list", "--num_workers=1"),
    }


LOOKS_OF_RUN = ("inspect seen", "inspect planned", "inspect document", "replay")
LOOKS = ("read bin", "read array_record", "exclude", "between", "token", "id", "url", "check", *LOOKS_OF_RUN)


def without_times(text: str) -> str:
    return text.split(" replayed (")[0].split(" are as the ledger says")[0]


def verdict(path: Path, right: tuple[str, str], found: tuple[str, str], *, names: bool = True) -> str:
    """ "right", "refused", or what is wrong with an answer."""
    kind, text = found
    if kind == "said":
        same = without_times(text) == without_times(right[1])
        return "right" if same and right[0] == "said" else f"another answer: {text[:300]}"
    if "Traceback" in text or any(ord(c) < 32 and c not in "\n\t" for c in text):
        return f"no message for people: {text[:300]}"
    where = (path.name, str(path.parent))
    return "refused" if not names or any(each in text for each in where) else f"names no file: {text[:300]}"


def damage_all(good, num_each: int, seed: int, max_looks: int) -> Counter:
    """Damages each file `num_each` times; gives counts of (kind of file, verdict)."""
    folder, dataset, run = good
    looks = looks_at(dataset, run)
    right = {name: look() for name, look in looks.items()}
    assert {kind for kind, _ in right.values()} == {"said"}, right
    rng, counts, wrong = random.Random(seed), Counter(), []
    files = [p for p in sorted(dataset.iterdir()) if p.name not in ("README.md", "card.html")]
    files += [run / "data.json", run / "ledger.bin"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in files:
        kind = path.name if path.suffix == ".json" or path.parent == run else path.suffix.partition("-")[0]
        names = [n for n in looks if path.parent == dataset or n in LOOKS_OF_RUN]
        for _ in range(num_each):
            content = path.read_bytes()
            ways = [bytes_changed]
            if path.suffix == ".json":
                ways.append(lambda c, r: json_changed(c, r, signed=False))
            changed = rng.choice(ways)(content, rng)
            for name in rng.sample(names, min(max_looks, len(names))):
                start = time.perf_counter()
                try:
                    found = with_file(path, changed, looks[name])
                except BaseException as error:
                    found = ("error", f"Traceback {type(error).__name__}: {error}")
                what = verdict(path, right[name], found)
                if time.perf_counter() - start > MAX_SECS:
                    what = "slow"
                if path.name == "ledger.bin" and what.startswith("another answer"):
                    # Cut at a step's end it is the ledger of a shorter run: nothing says that it is not (yet).
                    what = "shorter ledger" if len(changed) % 8 == 0 and content.startswith(changed) else what
                counts[kind, what if len(what) < 20 else "WRONG"] += 1
                if len(what) >= 20 or what == "slow":
                    wrong.append(f"{path.name}, {name}: {what}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert not wrong, "\n".join(wrong[:20]) + f"\n{len(wrong)} in all"
    assert grown < MAX_GROWTH_BYTES
    return counts


def test_damaged_files_give_the_right_answer_or_a_line_that_names_them(good):
    counts = damage_all(good, num_each=8, seed=1, max_looks=2)
    print("\n" + "\n".join(f"{kind}: {what} {n}" for (kind, what), n in sorted(counts.items())))


def test_a_batch_that_is_not_as_the_ledger_says_is_not_shown(good):
    _, _, run = good
    path = run / "ledger.bin"
    content = bytearray(path.read_bytes())
    content[8 + 8 * 6] ^= 1  # of update 7
    for step, status in (("7", "error"), ("8", "said"), ("50", "said")):
        kind, text = with_file(path, bytes(content), lambda step=step: command(inspect.main, str(run), "--step", step))
        assert kind == status and ("the batch of update 7" in text) == (kind == "error")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_more_damaged_files(good, seed):
    counts = damage_all(good, num_each=60, seed=100 + seed, max_looks=4)
    print("\n" + "\n".join(f"{kind}: {what} {n}" for (kind, what), n in sorted(counts.items())))


def forged(good, num_each: int, seed: int) -> Counter:
    """Manifests and data.json whose digests agree, as a stranger may make them: any answer but a traceback, in bounds."""
    folder, dataset, run = good
    rng, counts, wrong = random.Random(seed), Counter(), []
    looks = looks_at(dataset, run)
    for path in (dataset / "manifest.json", run / "data.json"):
        names = [n for n in looks if path.parent == dataset or n in LOOKS_OF_RUN]
        for _ in range(num_each):
            changed = json_changed(path.read_bytes(), rng, signed=True)
            for name in rng.sample(names, 2):
                start = time.perf_counter()
                try:
                    kind, text = with_file(path, changed, looks[name])
                    what = "refused" if kind == "error" else "answered"
                    if any(ord(c) < 32 and c not in "\n\t" for c in text):
                        what = "WRONG"
                        wrong.append(f"{path.name}, {name}: prints control characters: {text!r:.300}")
                except BaseException as error:
                    what = "WRONG"
                    wrong.append(f"{path.name}, {name}: {type(error).__name__}: {error!r:.300}")
                if time.perf_counter() - start > MAX_SECS:
                    wrong.append(f"{path.name}, {name}: took {time.perf_counter() - start:.0f} s")
                counts[path.name, what] += 1
    assert not wrong, "\n".join(wrong[:20]) + f"\n{len(wrong)} in all"
    return counts


def test_forged_manifests_and_plans_end_in_words(good):
    print(forged(good, 60, seed=3))


@pytest.mark.slow
def test_many_more_forged_manifests_and_plans(good):
    print(forged(good, 1500, seed=4))


@pytest.mark.slow
def test_repair_of_damage_by_chance_gives_the_bytes_back_or_a_line(good, tmp_path):
    _, dataset, _ = good
    rng = random.Random(5)
    whole = {p.name: p.read_bytes() for p in dataset.iterdir()}
    for _ in range(60):
        copy = tmp_path / "copy"
        shutil.copytree(dataset, copy)
        for name in rng.sample([n for n in whole if n not in ("README.md", "card.html", "manifest.json")], 2):
            (copy / name).write_bytes(bytes_changed(whole[name], rng))
        kind, text = command(check.main, str(copy), "--num_workers=1", "--repair")
        assert kind == "said", text
        assert {p.name: p.read_bytes() for p in copy.iterdir()} == whole
        shutil.rmtree(copy)
