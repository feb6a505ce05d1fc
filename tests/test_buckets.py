"""Objects in buckets: each test runs against emulators of Google's and of Amazon's, and most break something."""

import multiprocessing
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.bucket_child import copy_in_child
from support.buckets import STORES, BucketServer, refusal, s3_refusal, served
from support.fault_proxy import ALWAYS, Fault

from data_prep.inputs.paths import expand
from data_prep.store import bucket_clients, bucket_transfers, buckets
from data_prep.store.buckets import BucketError, Changed
from data_prep.store.locations import file_info, open_file

MIB = 1 << 20
PASSING = ["500", "502", "503", "504", "429", "408", "reset", "lost"]


def fault(kind: str, **options) -> Fault:
    return Fault("status", status=int(kind), **options) if kind.isdigit() else Fault(kind, **options)


def denied(server, status: int, reason: str, code: str) -> Fault:
    """What the store says where it says no."""
    reply = refusal(status, reason) if server.scheme == "gs" else s3_refusal(status, code)
    return Fault("status", status=status, body=reply.body, content_type=reply.headers["content-type"], times=ALWAYS)


@pytest.fixture(params=STORES)
def bucket_server(request, bucket_servers, monkeypatch) -> Iterator[BucketServer]:
    yield from served(request.param, bucket_servers, monkeypatch)


@pytest.fixture
def small_pieces(monkeypatch) -> int:
    """5 MiB, the least that S3 takes as a part."""
    monkeypatch.setattr(bucket_transfers, "PIECE_BYTES", 5 * MIB)
    return 5 * MIB


@pytest.fixture
def large(tmp_path, small_pieces):
    """A file of three pieces, the last one short."""
    path = tmp_path / "large"
    path.write_bytes(random.Random(0).randbytes(2 * small_pieces + 1234))
    return path


def test_which_paths_are_in_buckets():
    assert all(map(buckets.is_bucket, ("gs://b", "gcs://b/a", "s3://b/a/")))
    assert not any(map(buckets.is_bucket, ("b/a", "/gs://b", "https://b/a", "hf://b", "file:///a", "s3:/b", "gs")))


@pytest.mark.parametrize("content", [b"", b"a", b"--border\r\n\r\nends with a line\r\n", bytes(range(256)) * 999])
def test_what_was_written_is_read(bucket, content, tmp_path):
    url = buckets.join(bucket, "runs/1", "a b+é%2F&=.bin")
    assert buckets.stat(url) is None
    put = buckets.write(url, content)
    assert buckets.stat(url) == put == buckets.Object(url, len(content), put.version)
    assert buckets.read(url) == content
    for start, num_bytes in ((0, 1), (3, 10), (1, None), (0, 10**7), (10**7, 5), (0, 0), (len(content), None)):
        assert buckets.read(url, start, num_bytes) == content[start:][:num_bytes]
    received: list[int] = []
    buckets.download(url, tmp_path / "copy", received=received.append)
    assert (tmp_path / "copy").read_bytes() == content
    assert sum(received) == len(content)
    (tmp_path / "copy").write_bytes(content + b"more")
    assert buckets.upload(tmp_path / "copy", url).num_bytes == len(content) + 4
    assert buckets.read(url) == content + b"more"


def test_large_object_goes_and_comes_in_pieces(bucket, bucket_server, large, tmp_path):
    url = bucket + "/large"
    put = buckets.upload(large, url, if_version="absent")
    assert put == buckets.stat(url)
    received: list[int] = []
    buckets.download(url, tmp_path / "copy", received=received.append)
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert len(received) == 3
    assert max(len(request.body) for request in bucket_server.proxy.seen) <= 5 * MIB


def test_listing_is_what_is_there_now_page_by_page(bucket, bucket_server, monkeypatch):
    monkeypatch.setattr(buckets, "LISTED_AT_ONCE", 2)
    names = ["a/1", "a/2", "a/b/3", "a/b/c/4", "ab/5"]
    put = {name: buckets.write(f"{bucket}/{name}", name.encode()) for name in names}
    buckets.write(f"{bucket}/z", b"")
    assert [each.url for each in buckets.list_objects(bucket)] == [f"{bucket}/{name}" for name in (*names, "z")]
    assert list(buckets.list_objects(bucket + "/a")) == [put[name] for name in names[:4]]
    assert list(buckets.list_objects(bucket + "/a/")) == [put[name] for name in names[:4]]
    assert list(buckets.list_objects(bucket + "/a", recursive=False)) == [put[name] for name in names[:2]]
    assert list(buckets.list_objects(bucket + "/a/1")) == []
    # Others write, and it shows at once.
    requests = len(bucket_server.proxy.seen)
    assert [each.url for each in buckets.list_objects(bucket + "/ab")] == [f"{bucket}/ab/5"]
    assert len(bucket_server.proxy.seen) > requests
    buckets.remove_all(bucket + "/a")
    assert [each.url for each in buckets.list_objects(bucket)] == [f"{bucket}/ab/5", f"{bucket}/z"]
    with pytest.raises(BucketError, match="is a whole bucket"):
        buckets.remove_all(bucket)


def test_removing_what_is_absent_is_no_error(bucket):
    url = bucket + "/a"
    version = buckets.write(url, b"1").version
    buckets.remove(url)
    buckets.remove(url)
    buckets.remove(url, if_version=version)
    buckets.remove_all(bucket + "/nothing")
    assert buckets.stat(url) is None


@pytest.mark.parametrize("size", ["small", "large"])
def test_preconditions(bucket, size, request):
    path = request.getfixturevalue("large") if size == "large" else None

    def put(content: bytes, if_version):
        if path is None:
            return buckets.write(url, content, if_version=if_version)
        path.write_bytes(content + path.read_bytes()[len(content) :])
        return buckets.upload(path, url, if_version=if_version)

    url = bucket + "/a"
    first = put(b"first", "absent")
    with pytest.raises(Changed, match=rf"^{url}: is there already, expected none"):
        put(b"other", "absent")
    second = put(b"second", first.version)
    with pytest.raises(Changed, match=rf"^{url}: is no longer version {first.version}") as error:
        put(b"third", first.version)
    assert "\n" not in str(error.value)
    assert buckets.read(url, 0, 6) == b"second"
    with pytest.raises(Changed):
        buckets.remove(url, if_version=first.version)
    assert buckets.stat(url) == second
    buckets.remove(url, if_version=second.version)
    with pytest.raises(Changed):
        put(b"fourth", second.version)
    assert buckets.stat(url) is None
    put(b"fifth", "absent")


@pytest.mark.parametrize("size", ["small", "large"])
def test_of_several_writers_that_expect_none_one_succeeds(bucket, size, request, tmp_path):
    num_writers = 6 if size == "small" else 2
    path = request.getfixturevalue("large") if size == "large" else None
    barrier = threading.Barrier(num_writers)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            if path is None:
                buckets.write(bucket + "/lease", b"the same of all", if_version="absent")
            else:
                buckets.upload(path, bucket + "/lease", if_version="absent")
            return True
        except Changed:
            return False

    with ThreadPoolExecutor(num_writers) as pool:
        assert sum(pool.map(attempt, range(num_writers))) == 1


@pytest.mark.parametrize("kind", PASSING)
def test_errors_that_pass_are_retried(bucket, bucket_server, kind, tmp_path):
    url = bucket + "/a"
    work = {
        "write": lambda: buckets.write(url, b"content", if_version="absent"),
        "stat": lambda: buckets.stat(url),
        "read": lambda: buckets.read(url),
        "range": lambda: buckets.read(url, 1, 3),
        "download": lambda: buckets.download(url, tmp_path / "copy"),
        "list": lambda: list(buckets.list_objects(bucket)),
        "writable": lambda: buckets.check_writable(bucket),
        "readable": lambda: buckets.check_readable(bucket),
        "remove": lambda: buckets.remove(url),
    }
    results = {}
    for name, each in work.items():
        bucket_server.fail(fault(kind))
        results[name] = each()
        assert not bucket_server.proxy.faults, f"{name} made no request"
    assert results["stat"] == results["write"] == results["list"][0]
    assert (results["read"], results["range"]) == (b"content", b"ont")
    assert buckets.stat(url) is None


@pytest.mark.parametrize("kind", ["503", "reset", "lost"])
def test_each_request_of_a_large_upload_is_retried(bucket, bucket_server, kind, large):
    url = bucket + "/a"
    buckets.upload(large, url, if_version="absent")
    requests = len(bucket_server.proxy.seen)
    buckets.remove(url)
    for place in range(requests):
        bucket_server.fail(fault(kind, skip=place))
        buckets.upload(large, url, if_version="absent")
        assert not bucket_server.proxy.faults
        assert buckets.read(url) == large.read_bytes()
        buckets.remove(url)


def test_lost_answer_of_a_put_is_no_conflict(bucket, bucket_server):
    url = bucket + "/a"
    bucket_server.fail(Fault("lost"))
    first = buckets.write(url, b"1", if_version="absent")
    bucket_server.fail(Fault("lost", times=2))
    second = buckets.write(url, b"2", if_version=first.version)
    assert buckets.stat(url) == second
    # But equal content that another one wrote is a conflict.
    with pytest.raises(Changed):
        buckets.write(url, b"2", if_version="absent")
    bucket_server.fail(Fault("lost"))
    buckets.remove(url, if_version=second.version)
    assert buckets.stat(url) is None


@pytest.mark.parametrize("kind", ["truncated", "short", "wrong"])
def test_bad_answers_are_never_returned(bucket, bucket_server, kind, large, tmp_path):
    content = random.Random(1).randbytes(100_000)
    buckets.write(bucket + "/a", content)
    bucket_server.fail(Fault(kind, times=2))
    assert buckets.read(bucket + "/a") == content
    if kind == "wrong":
        return  # of a range no digest is known: the caller's digest finds it
    bucket_server.fail(Fault(kind, times=2))
    assert buckets.read(bucket + "/a", 50, 60_000) == content[50:60_050]
    buckets.upload(large, bucket + "/b")
    bucket_server.fail(Fault(kind, method="GET", skip=1 if bucket_server.scheme == "gs" else 0, times=2))
    buckets.download(bucket + "/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()


def test_bytes_damaged_on_their_way_are_sent_again(bucket, bucket_server, large):
    content = random.Random(1).randbytes(100_000)
    bucket_server.fail(Fault("damaged"))
    buckets.write(bucket + "/a", content)
    assert buckets.read(bucket + "/a") == content
    if bucket_server.scheme == "s3":  # of an upload in parts to GCS the digest comes at the end, and it begins anew
        bucket_server.fail(Fault("damaged", method="PUT", skip=1))
    buckets.upload(large, bucket + "/b")
    assert buckets.read(bucket + "/b") == large.read_bytes()


def test_damaged_bytes_make_no_object(bucket, bucket_server, large, impatient):
    bucket_server.fail(Fault("damaged", times=ALWAYS))
    with pytest.raises(BucketError, match="cannot be written, tried again for 1 s"):
        buckets.write(bucket + "/a", bytes(1000))
    bucket_server.proxy.faults.clear()
    assert buckets.stat(bucket + "/a") is None
    bucket_server.fail(Fault("damaged", method="PUT", skip=1, times=ALWAYS))
    with pytest.raises(BucketError):
        buckets.upload(large, bucket + "/a")
    bucket_server.proxy.faults.clear()
    assert buckets.stat(bucket + "/a") is None


def test_upload_that_the_store_has_forgotten_begins_anew(bucket, bucket_server, large):
    body = s3_refusal(404, "NoSuchUpload").body if bucket_server.scheme == "s3" else b""
    bucket_server.fail(Fault("status", status=404, body=body, method="PUT", skip=1))
    buckets.upload(large, bucket + "/a", if_version="absent")
    assert buckets.read(bucket + "/a") == large.read_bytes()


def test_object_that_is_replaced_while_it_is_downloaded_is_an_error(bucket, bucket_server, large, tmp_path):
    url = bucket + "/a"
    buckets.upload(large, url)
    replaced = []

    def replace_once(num_bytes: int) -> None:
        if not replaced:
            replaced.append(buckets.write(url, b"new"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "PIECES_AT_ONCE", 1)
        with pytest.raises(Changed, match="is no longer version"):
            buckets.download(url, tmp_path / "copy", received=replace_once)
    assert os.listdir(tmp_path) == ["large"]


@pytest.mark.parametrize("kind", ["503", "reset", "silent", "truncated"])
def test_store_that_stays_away_is_given_up_soon_in_one_line(bucket, bucket_server, kind, tmp_path, impatient):
    buckets.write(bucket + "/a", b"content")
    bucket_server.fail(fault(kind, secs=10, times=ALWAYS))
    began = time.monotonic()
    with pytest.raises(BucketError) as error:
        buckets.download(bucket + "/a", tmp_path / "copy")
    assert time.monotonic() - began < 3.5 * impatient
    assert re.fullmatch(
        rf"{bucket}/a: cannot be downloaded, tried again for 1 s: .*Try again later.*", str(error.value)
    )
    assert os.listdir(tmp_path) == []
    assert len(bucket_server.proxy.seen) >= 3


def test_nobody_there(bucket_server, monkeypatch, impatient):
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://me:hidden@127.0.0.1:9")
    with pytest.raises(BucketError, match=r"^\w+://bucket/a: cannot be read, tried again for 1 s: ") as error:
        buckets.stat(f"{bucket_server.scheme}://bucket/a")
    assert "hidden" not in str(error.value) and "\n" not in str(error.value)


def test_missing_bucket(bucket_server, tmp_path):
    missing = f"{bucket_server.scheme}://no-such-bucket"
    (tmp_path / "a").write_bytes(b"1")
    expected = rf"^{missing}(/a)?: there is no bucket no-such-bucket. Check its name, or create it: `\w+ .* {missing}`$"
    for attempt in (
        lambda: buckets.check_writable(missing + "/a"),
        lambda: buckets.check_readable(missing + "/a"),
        lambda: buckets.stat(missing + "/a"),
        lambda: list(buckets.list_objects(missing)),
        lambda: buckets.read(missing + "/a"),
        lambda: buckets.download(missing + "/a", tmp_path / "copy"),
        lambda: buckets.upload(tmp_path / "a", missing + "/a"),
        lambda: buckets.write(missing + "/a", b"", if_version="absent"),
        lambda: buckets.remove_all(missing + "/a"),
    ):
        with pytest.raises(BucketError, match=expected):
            attempt()


def test_missing_object(bucket, tmp_path):
    for attempt in (lambda: buckets.read(bucket + "/a"), lambda: buckets.download(bucket + "/a", tmp_path / "copy")):
        with pytest.raises(BucketError, match=rf"^{bucket}/a: no such object$"):
            attempt()


def test_errors_that_do_not_pass_are_not_retried(bucket, bucket_server):
    for status, reason, code, expected in (
        (
            401,
            "authError",
            "InvalidAccessKeyId",
            "cannot be read: .*(gcloud auth application-default login|aws configure)",
        ),
        (403, "quotaExceeded", "AccessDenied", "cannot be read: .*403|permission denied"),
        (400, "badRequest", "InvalidRequest", "cannot be read: "),
    ):
        bucket_server.proxy.faults.clear()
        bucket_server.fail(denied(bucket_server, status, reason, code))
        requests = len(bucket_server.proxy.seen)
        with pytest.raises(BucketError, match=expected) as error:
            buckets.check_readable(bucket + "/a")
        assert "\n" not in str(error.value)
        assert len(bucket_server.proxy.seen) == requests + 1


@pytest.mark.parametrize("bucket_server", ["gs"], indirect=True)
def test_too_many_requests_in_googles_words(bucket, bucket_server):
    limit = denied(bucket_server, 403, "rateLimitExceeded", "")
    limit.times = 2
    bucket_server.fail(limit)
    assert buckets.stat(bucket + "/a") is None


def test_right_to_write_is_missing(bucket, bucket_server):
    if bucket_server.scheme == "gs":
        bucket_server.fail(Fault("status", status=200, body=b'{"permissions": ["storage.objects.get"]}'))
        expected = "storage.objects.create and storage.objects.delete and storage.objects.list not granted"
    else:
        bucket_server.fail(denied(bucket_server, 403, "", "AccessDenied"))
        expected = r"permission denied \(AccessDenied said by the proxy\). Ask the bucket's owner for s3:ListBucket"
    with pytest.raises(BucketError, match=expected):
        buckets.check_writable(bucket + "/a")


def test_checks_write_nothing_that_shows(bucket):
    buckets.check_writable(bucket + "/a")
    buckets.check_writable(bucket)
    buckets.check_readable(bucket + "/a/")
    assert list(buckets.list_objects(bucket)) == []


def test_no_credentials(bucket_server, monkeypatch, tmp_path):
    if bucket_server.scheme == "gs":
        bucket_server.fail(denied(bucket_server, 401, "authError", ""))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(BucketError, match=r"no Google credentials were found|Unable to locate credentials"):
        buckets.check_writable(f"{bucket_server.scheme}://bucket/a")


@pytest.mark.parametrize("extra", ["gcs", "s3"])
def test_missing_extra(extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, f"{extra}fs", None)
    scheme = {"gcs": "gs", "s3": "s3"}[extra]
    expected = rf"^{scheme}://bucket/a: needs {extra}fs .*Install it: `pip install 'gpt-pretrain\[{extra}\]'`$"
    for check in (buckets.check_writable, buckets.check_readable, buckets.stat):
        with pytest.raises(BucketError, match=expected):
            check(f"{scheme}://bucket/a")
    with pytest.raises(ValueError, match=r"a.jsonl: cannot be .*`pip install 'gpt-pretrain\[\w+\]'`"):
        file_info(f"{scheme}://bucket/a.jsonl")


@pytest.mark.parametrize(
    "url",
    [
        *("gs://", "s3:///a", "gs://B/a", "gs://b", "s3://key:secret@bucket/a", "https://bucket/a", "s3://bucket/a#1"),
        *("gs://bucket/a//b", "gs://bucket/a/../b", "gs://bucket/./a", "gs://bucket//a", "s3://bucket/a?x=secret"),
        *("gs://bucket/a\nb", "gs://bucket/" + "a" * 1001),
    ],
)
def test_wrong_url_is_refused_before_anything_is_asked(url):
    with pytest.raises(BucketError) as error:
        buckets.check_writable(url)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_one_object_has_a_name():
    for call in (buckets.stat, buckets.read, buckets.remove):
        with pytest.raises(BucketError, match=r"^gs://bucket/: is a whole bucket; name something in it$"):
            call("gs://bucket/")


def test_patience_has_to_be_a_number(bucket_server, monkeypatch):
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", text)
        with pytest.raises(ValueError, match=rf"^GPT_PRETRAIN_BUCKET_PATIENCE_SECS='{text}'; expected a number of sec"):
            buckets.stat(f"{bucket_server.scheme}://bucket/a")


def test_several_threads(bucket):
    def work(number: int) -> bytes:
        buckets.write(f"{bucket}/{number}", b"%d" % number, if_version="absent")
        return buckets.read(f"{bucket}/{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [b"%d" % number for number in range(24)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(bucket, method):
    """Forked after this one has used its clients, while another thread holds their lock."""
    buckets.write(bucket + "/parent", b"1")
    context = multiprocessing.get_context(method)
    child = context.Process(target=copy_in_child, args=(bucket,))
    with bucket_clients._clients.lock:
        child.start()
    child.join(20)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
    assert buckets.read(bucket + "/child") == b"1"


def test_inputs_are_read_from_buckets(bucket):
    for name in ("texts/b.jsonl", "texts/a.jsonl", "texts/_note"):
        buckets.write(f"{bucket}/{name}", b'{"text": "hello"}\n')
    expected = [f"{bucket}/texts/a.jsonl", f"{bucket}/texts/b.jsonl"]
    assert expand(bucket + "/texts/*.jsonl") == expected
    assert expand(bucket + "/texts") == expected
    with open_file(expected[0]) as file:
        assert file.read() == b'{"text": "hello"}\n'
    assert file_info(expected[0])["size"] == 18
