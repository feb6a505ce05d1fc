"""Text from documents and names from files does nothing to a terminal or a page but stand there."""

import json
import re

import numpy as np
import pytest
from support.inspected_run import simple_plan, stream, write_run

from data_prep import card, check, documents, fineweb
from data_prep.pages.text import json_line, one_line, printable
from gpt_pretrain import inspect, replay

# A terminal's commands (8-bit ones too), and letters that turn the direction of what follows.
OBEYED = "\x1b]0;title\x07\x1b[2J\x9b31m\x00\x08\x7f\x85\u202e\u2066\u200f\u061c\u206b"
BAD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {
            "text": f"{OBEYED} words {i}\n\tmore\r\n",
            "id": f"id\n{OBEYED}{i}",
            "url": f"https://e.org/{OBEYED}\r{i}",
            "dump": OBEYED,
            "language": OBEYED,
        }
        for i in range(90)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    options = ["--tokenizer=byte", "--val_tokens=300", "--shard_tokens=2000", "--record_tokens=64", "--num_workers=1"]
    assert fineweb.main([f"--input={folder / 'a.jsonl'}", f"--output_dir={out}", *options]) == 0
    run = write_run(folder / "run", {"": str(out)}, simple_plan(stream(str(out))), num_steps=20, num_consumed=10)
    return str(out), run, rows


def test_every_command_prints_text_that_nothing_obeys(hostile, capsys, tmp_path):
    out, run, rows = hostile
    row = rows[60]
    looks = [
        (documents.main, [out, "--token", "900", "--text"]),
        (documents.main, [out, "--id", row["id"]]),
        (documents.main, [out, "--id", "nobody\x1b[2J\u202e"]),
        (check.main, [out, "--num_workers=1"]),
        (inspect.main, [run, "--step", "3", "--full"]),
        (inspect.main, [run, "--step", "3"]),
        (inspect.main, [run, "--step", "3", "--jsonl"]),
        (inspect.main, [run, "--document", row["id"]]),
        (inspect.main, [run, "--url", row["url"], "--jsonl"]),
        (inspect.main, [run, "--document", "\x9b\u202e"]),
        (inspect.main, [run, "--step", "3", f"--html={tmp_path / 'page.html'}"]),
        (replay.main, [run, "--jsonl"]),
    ]
    capsys.readouterr()
    for main, arguments in looks:
        main(arguments)
        captured = capsys.readouterr()
        assert captured.out + captured.err or "--html" in str(arguments)
        assert not BAD.search(captured.out + captured.err), (main.__module__, arguments)
        if "--jsonl" in arguments or main is documents.main:
            assert all(isinstance(json.loads(line), dict) for line in captured.out.splitlines())
    documents.main([out, "--id", row["id"]])
    found = json.loads(capsys.readouterr().out)
    assert (found["id"], found["url"], found["dump"]) == (row["id"], row["url"], row["dump"])  # escaped, not lost
    card.write_card(out)
    for page in (tmp_path / "page.html", f"{out}/card.html", f"{out}/README.md"):
        with open(page, encoding="utf-8") as file:
            assert not BAD.search(file.read())


def test_names_stay_in_their_line(hostile, capsys):
    out, run, rows = hostile
    assert inspect.main([run, "--document", rows[60]["id"]]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("id ")
    assert one_line("a\nb\u2028c\x85d") == "a b c\ufffdd" or one_line("a\nb\u2028c") == "a b c"


def test_every_character_is_printed_or_replaced_and_json_keeps_it():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), *np.arange(0x1F600, 0x1F650)]))
    shown = printable(every)
    assert not BAD.search(shown) and "\n" in shown and "\t" in shown and "😀" in shown and "ش" in shown
    assert json.loads(json_line([every, "\ud800"])) == [every, "\ud800"] and not BAD.search(
        json_line([every, "\ud800"])
    )
