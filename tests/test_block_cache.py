"""The cache of what lies in buckets: what is there is what its name says, once for all processes, and not too much."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from blake3 import blake3
from support.prepared import flip
from support.training_runs import environment

from data_prep.store.block_cache import MAX_ARRIVALS, SOON, BlockCache, default_folder

SIZE = 1000


class Store:
    """Contents by number, and how often each was fetched."""

    def __init__(self, cache: BlockCache):
        self.cache, self.fetched = cache, []

    def get(self, number: int, *, wrong: int = 0) -> Path:
        content, digest = content_of(number)

        def fill(partial: Path) -> None:
            self.fetched.append(number)
            partial.write_bytes(content[::-1] if self.fetched.count(number) <= wrong else content)

        return self.cache.get("blocks", digest, SIZE, fill, what=f"gs://b/{number}", advice="Do this.")


def content_of(number: int) -> tuple[bytes, str]:
    content = number.to_bytes(8, "little") * (SIZE // 8)
    return content, blake3(content).hexdigest()


def held(cache: BlockCache) -> set[str]:
    return {path.name for path in Path(cache.folder, "blocks").rglob("*") if path.is_file()}


def test_it_is_fetched_once_and_lies_under_its_digest(tmp_path):
    store = Store(BlockCache(tmp_path))
    content, digest = content_of(7)
    path = store.get(7)
    assert path == tmp_path / "blocks" / digest[:2] / digest and path.read_bytes() == content
    assert store.get(7) == path and store.fetched == [7]
    again = Store(BlockCache(tmp_path))
    assert again.get(7) == path and not again.fetched


def test_wrong_bytes_are_fetched_again_and_never_land(tmp_path):
    store = Store(BlockCache(tmp_path))
    assert store.get(1, wrong=MAX_ARRIVALS - 1).read_bytes() == content_of(1)[0]
    with pytest.raises(
        ValueError, match=r"^gs://b/2: digest is [0-9a-f]{64}, expected .* \(fetched 3 times\)\. Do"
    ) as e:
        store.get(2, wrong=99)
    assert "\n" not in str(e.value) and store.fetched.count(2) == MAX_ARRIVALS
    assert held(store.cache) == {content_of(1)[1]}
    assert not [path for path in tmp_path.rglob("*partial*")]


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_what_was_damaged_on_disk_is_fetched_again(tmp_path, how, caplog):
    path = Store(BlockCache(tmp_path)).get(3)
    flip(path) if how == "flipped" else os.truncate(path, 10)
    store = Store(BlockCache(tmp_path))  # of another process
    assert store.get(3).read_bytes() == content_of(3)[0] and store.fetched == [3]
    assert "was damaged on this disk" in caplog.text
    flip(path)  # and after this one has looked
    assert store.get(3).read_bytes() == content_of(3)[0] and store.fetched == [3, 3]


def test_what_goes_is_needed_last_and_what_is_needed_soon_stays(tmp_path):
    uses = {content_of(n)[1]: use for n, use in enumerate([SOON, 50.0, 10.0, SOON, 90.0, 20.0])}

    class Future:
        def next_uses(self, digests):
            return [uses.get(digest) for digest in digests]

    store = Store(BlockCache(tmp_path, 4 * SIZE))
    store.cache.future = Future()
    for number in (0, 1, 2, 3):
        store.get(number)
    store.get(4)
    assert content_of(1)[1] not in held(store.cache)
    store.get(5)
    assert held(store.cache) == {content_of(n)[1] for n in (0, 2, 3, 5)}
    for number in range(6, 30):
        store.get(number)
        assert len(held(store.cache)) <= 4 and {content_of(0)[1], content_of(3)[1]} <= held(store.cache)


def test_without_a_plan_what_was_used_last_stays(tmp_path):
    store = Store(BlockCache(tmp_path, 3 * SIZE))
    for number in (0, 1, 2, 0, 3):
        store.get(number)
        time.sleep(0.01)
    assert content_of(0)[1] in held(store.cache) and content_of(1)[1] not in held(store.cache)


def test_who_keeps_a_file_open_is_told_that_it_goes(tmp_path):
    forgot = []

    class User:
        def forget(self, digest):
            forgot.append(digest)

    store, user = Store(BlockCache(tmp_path, 2 * SIZE)), User()
    store.cache.add_user(user)
    for number in range(3):
        store.get(number)
    assert forgot == [content_of(0)[1]]


def test_what_failed_takes_no_room(tmp_path):
    store = Store(BlockCache(tmp_path, 3 * SIZE))
    store.get(0)
    for number in range(1, 9):
        with pytest.raises(ValueError):
            store.get(number, wrong=99)
    assert int((tmp_path / "locks" / "room").read_text()) == SIZE
    store.get(10)
    assert held(store.cache) == {content_of(0)[1], content_of(10)[1]}


def test_a_name_that_is_no_digest_leads_nowhere(tmp_path):
    cache = BlockCache(tmp_path)
    for name in ("../../x", "a" * 63, "A" * 64, ""):
        with pytest.raises(ValueError, match="expected a BLAKE3 digest"):
            cache.get("files", name, 1, lambda path: path.write_bytes(b"x"), what="x")


def test_what_a_killed_process_left_half_there_goes(tmp_path):
    Store(BlockCache(tmp_path)).get(1)
    (folder,) = (tmp_path / "blocks").iterdir()
    old, new = folder / f".{'0' * 64}.partial", folder / f".{'1' * 64}.partial"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    BlockCache(tmp_path)
    assert not old.exists() and new.exists()


def test_folders_that_cannot_be_are_said_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: cannot hold the cache .*data\.cache_dir"):
        BlockCache(tmp_path / "file")
    with pytest.raises(ValueError, match=r"has room for \d+ bytes, expected 1000000000000000000 "):
        BlockCache(tmp_path / "new", 10**18)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_folder() == "/elsewhere/gpt_pretrain/data"


FETCHES = """
import json, sys, time
from pathlib import Path
from test_block_cache import BlockCache, Store
store = Store(BlockCache(sys.argv[1]))
fill = Path.write_bytes
Path.write_bytes = lambda path, content: (time.sleep(0.02), fill(path, content))
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    store.get(number)
print(json.dumps(store.fetched))
"""


def test_two_processes_fetch_each_thing_once(tmp_path):
    command = [sys.executable, "-c", FETCHES, str(tmp_path)]
    tests = str(Path(__file__).parent)
    processes = [
        subprocess.Popen(
            command, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tests
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    fetched = [json.loads(answer) for answer in answers]
    assert sorted(fetched[0] + fetched[1]) == list(range(20)) and all(fetched)


def test_threads_fetch_each_thing_once(tmp_path):
    store = Store(BlockCache(tmp_path))
    threads = [threading.Thread(target=lambda: [store.get(n) for n in range(30)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.fetched) == list(range(30))
