"""Copies of objects on this machine: fetched once, compared, bounded, and gone when nobody needs them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from blake3 import blake3
from support.bucket_datasets import fresh_scratch  # noqa: F401
from support.fault_proxy import ALWAYS, Fault

from data_prep.store import buckets, scratch
from data_prep.store.files import whole_file
from data_prep.store.scratch import OtherContent, local_copy

pytestmark = pytest.mark.usefixtures("fresh_scratch")
CONTENT = b"0123456789" * 1000
DIGEST = blake3(CONTENT).hexdigest()


@pytest.fixture
def url(bucket_server, bucket, monkeypatch) -> str:
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "10")
    buckets.write(f"{bucket}/a/b.bin", CONTENT)
    bucket_server.proxy.seen.clear()
    return f"{bucket}/a/b.bin"


def num_fetches(server) -> int:
    """Answers with the content of an object."""
    media = "alt=media" if server.scheme == "gs" else "b.bin"
    return sum(each.method == "GET" and media in each.path for each in server.proxy.seen)


def read(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def copies() -> list[str]:
    return sorted(path.name[33:] for path in scratch.folder().iterdir() if "lock" not in path.name)


def test_a_path_of_this_machine_is_given_as_it_is(tmp_path):
    with local_copy(tmp_path / "absent", "any digest") as path:
        assert path == str(tmp_path / "absent")


def test_a_copy_is_fetched_once_while_the_object_stays_what_it_is(bucket_server, url):
    for _ in range(3):
        with local_copy(url, DIGEST) as path:
            assert read(path) == CONTENT and path.endswith("-b.bin")
    assert num_fetches(bucket_server) == 1
    buckets.write(url, b"new")
    with local_copy(url) as path:
        assert read(path) == b"new"
    with pytest.raises(OtherContent, match=f"{url}: digest is"), local_copy(url, DIGEST):
        pass


def test_what_was_uploaded_is_not_fetched(bucket_server, bucket):
    with whole_file(f"{bucket}/b.bin") as partial:
        partial.write_bytes(CONTENT)
    with local_copy(f"{bucket}/b.bin", DIGEST) as path:
        assert read(path) == CONTENT
    assert num_fetches(bucket_server) == 0


def test_a_failed_block_puts_nothing_and_leaves_nothing(bucket):
    with pytest.raises(ZeroDivisionError), whole_file(f"{bucket}/b.bin") as partial:
        partial.write_bytes(CONTENT)
        raise ZeroDivisionError
    assert buckets.stat(f"{bucket}/b.bin") is None and copies() == []


def test_wrong_bytes_are_fetched_again_and_then_an_error(bucket_server, url):
    bucket_server.fail(Fault("wrong", method="GET", having="b.bin", times=1))
    with local_copy(url, DIGEST) as path:
        assert read(path) == CONTENT
    (scratch.folder() / os.path.basename(path)).unlink()
    bucket_server.fail(Fault("wrong", method="GET", having="b.bin", times=ALWAYS))
    with pytest.raises(OtherContent, match=f"{url}: digest is .* expected {DIGEST}"), local_copy(url, DIGEST):
        pass
    assert copies() == []


def test_what_is_put_again_while_it_is_fetched_is_fetched_again(url, monkeypatch):
    """A job that was done twice: its second put has the same bytes, and in one of the stores another version."""
    in_order, puts = buckets.in_order, []

    def after_another_put(works, at_once):
        if not puts:
            puts.append(buckets.write(url, CONTENT))
        return in_order(works, at_once)

    monkeypatch.setattr(buckets, "in_order", after_another_put)
    with local_copy(url, DIGEST) as path:
        assert puts and read(path) == CONTENT


def test_errors_speak_of_the_object(url):
    with pytest.raises(ValueError, match=f"^{url}: is bad$"), local_copy(url, DIGEST) as path:
        raise ValueError(f"{path}: is bad")


def test_copies_that_nobody_uses_make_room_the_oldest_first(bucket, url, monkeypatch):
    monkeypatch.setenv(scratch.SIZE, str(2.5 * len(CONTENT) / 1e9))
    names = ["c", "d", "e"]
    for name in names:
        buckets.write(f"{bucket}/{name}", CONTENT)
    with local_copy(url, DIGEST) as used:
        for name in names:
            with local_copy(f"{bucket}/{name}") as path:
                assert read(path) == CONTENT
            time.sleep(0.01)
        assert read(used) == CONTENT
        assert copies() == ["b.bin", "e"]
    with local_copy(f"{bucket}/c"):
        assert copies() == ["c", "e"]


FETCH = """
import sys, time
from data_prep.store.scratch import local_copy
with local_copy(sys.argv[1]) as path:
    print(path, flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_process_goes_when_the_next_one_starts(url, fresh_scratch):  # noqa: F811
    environment = os.environ | {"TMPDIR": str(fresh_scratch)}
    process = subprocess.Popen([sys.executable, "-c", FETCH, url], stdout=subprocess.PIPE, text=True, env=environment)
    path = process.stdout.readline().strip()
    assert read(path) == CONTENT
    with local_copy(url) as mine:
        assert os.path.dirname(mine) != os.path.dirname(path) and os.path.exists(path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert os.path.exists(path)
    scratch._folder.cache_clear()
    scratch._path.cache_clear()
    scratch.folder()
    assert not os.path.exists(os.path.dirname(path))


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan", "inf"])
def test_a_size_that_cannot_be_is_refused(monkeypatch, text):
    monkeypatch.setenv(scratch.SIZE, text)
    with pytest.raises(ValueError, match=scratch.SIZE):
        scratch.scratch_bytes()
