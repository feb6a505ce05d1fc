"""Emulators of both stores on loopback, behind a proxy that breaks what it is told to break.

Tests take the fixtures `bucket_server` and `bucket`, and run for both stores.

The emulators do not do all that the stores do. The proxies add what is missing, and nothing else:

- gcp-storage-emulator: ifGenerationMatch of puts (also in parts: at their begin and at their end) and removals;
  `generation` of reads; pages of listings; that an upload in parts can be given up; no Range where an upload has
  nothing yet; answers that name a missing bucket.
- moto: If-Match where an upload in parts ends; that two puts at once are decided in one step; Content-MD5.

Both miss more, which no test here needs: credentials are not checked (faults say 401 and 403), GCS digests are compared
after an upload in parts has been stored.
"""

import base64
import hashlib
import itertools
import json
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from support.fault_proxy import Fault, FaultProxy, Reply, Request, running

STORES = ("gs", "s3")
PATIENCE_SECS = 3.0  # enough on a busy machine
IMPATIENT_SECS = 1.0  # where a test waits for the end of it
_numbers = itertools.count()


@dataclass
class BucketServer:
    scheme: str
    proxy: FaultProxy

    def make_bucket(self) -> str:
        """The URL of a new one."""
        name = f"bucket-{next(_numbers)}"
        if self.scheme == "gs":
            body, method, path = json.dumps({"name": name}).encode(), "POST", "/storage/v1/b?project=test"
        else:
            body, method, path = b"", "PUT", f"/{name}"
        headers = {"content-type": "application/json", "content-length": str(len(body)), "host": "127.0.0.1"}
        assert self.proxy.ask_server(Request(method, path, headers, body)).status == 200
        return f"{self.scheme}://{name}"

    def fail(self, *faults: Fault) -> None:
        self.proxy.faults.extend(faults)


@pytest.fixture(scope="session")
def bucket_servers() -> Iterator[dict[str, BucketServer]]:
    with gcs_emulator() as gcs, s3_emulator() as s3:
        yield {"gs": gcs, "s3": s3}


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def bucket_server(request, bucket_servers, monkeypatch) -> Iterator[BucketServer]:
    """One of the stores, with the standard variables that lead to it, and retries that are over soon.

    The other one is for the slow tests, but where a module asks for both: they differ in `data_prep.store` only.
    """
    yield from served(request.param, bucket_servers, monkeypatch)


def served(store: str, bucket_servers: dict[str, BucketServer], monkeypatch) -> Iterator[BucketServer]:
    server = bucket_servers[store]
    for name, text in variables(bucket_servers).items():
        monkeypatch.setenv(name, text)
    server.proxy.faults.clear()
    server.proxy.seen.clear()
    yield server
    server.proxy.faults.clear()


@pytest.fixture
def impatient(bucket_server: BucketServer, monkeypatch) -> float:
    """Stores are given up after so many seconds."""
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", f"{IMPATIENT_SECS:g}")
    return IMPATIENT_SECS


@pytest.fixture
def bucket(bucket_server: BucketServer) -> str:
    """The URL of a new bucket of it."""
    return bucket_server.make_bucket()


def variables(servers: dict[str, BucketServer]) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": servers["gs"].proxy.url,
        "AWS_ENDPOINT_URL": servers["s3"].proxy.url,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "GPT_PRETRAIN_BUCKET_PATIENCE_SECS": f"{PATIENCE_SECS:g}",
    }


@contextmanager
def gcs_emulator() -> Iterator[BucketServer]:
    import logging

    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    for name in ("api.object", "api.bucket"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    host, port = server._api._httpd.server_address[:2]
    try:
        with running(FaultProxy(host, port, GcsRules())) as proxy:
            yield BucketServer("gs", proxy)
    finally:
        server.stop()


@contextmanager
def s3_emulator() -> Iterator[BucketServer]:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with running(FaultProxy(host, port, S3Rules())) as proxy:
            yield BucketServer("s3", proxy)
    finally:
        server.stop()


Ask = Callable[[Request], Reply]


@dataclass
class GcsRules:
    lock: threading.Lock = field(default_factory=threading.Lock)
    conditions: dict[str, tuple[str, str]] = field(default_factory=dict)  # of uploads: object, ifGenerationMatch

    def __call__(self, request: Request, ask: Ask) -> Reply:
        with self.lock:
            return self.answer(request, ask)

    def answer(self, request: Request, ask: Ask) -> Reply:
        query, path = request.query, request.path.partition("?")[0]
        bucket = path.partition("/b/")[2].partition("/")[0]
        upload = query.get("upload_id", "")
        target = path.removeprefix("/upload").removeprefix("/download")
        if "uploadType" in query:
            target += "/" + urllib.parse.quote(query["name"], safe="")
        if upload and request.method == "DELETE":
            return Reply(499, {}, b"")
        condition = query.get("ifGenerationMatch")
        if upload and upload in self.conditions and is_last(request):
            target, condition = self.conditions[upload]
        if condition is not None and condition != self.generation(target, ask):
            return refusal(412, "conditionNotMet")
        wanted = query.get("generation")
        if query.get("alt") == "media" and wanted and wanted != self.generation(target, ask):
            return refusal(404, "No such object: another generation")
        reply = ask(request)
        if reply.status == 404 and not upload and ask(get(f"/storage/v1/b/{bucket}", request)).status == 404:
            return refusal(404, "The specified bucket does not exist.")
        if query.get("uploadType") == "resumable" and reply.status == 200 and not upload and condition is not None:
            location = Request("PUT", reply.headers["location"], {}, b"").query
            self.conditions[location["upload_id"]] = target, condition
        if reply.status == 308 and reply.headers.get("range") == "bytes=0-0":
            del reply.headers["range"]
        if request.method == "GET" and path.endswith("/o") and reply.status == 200:
            reply.body = page_of(json.loads(reply.body), query)
        return reply

    def generation(self, target: str, ask: Ask) -> str:
        reply = ask(Request("GET", target, {"host": "127.0.0.1"}, b""))
        return json.loads(reply.body)["generation"] if reply.status == 200 else "0"


def is_last(request: Request) -> bool:
    """Whether this is the end of an upload in parts: `bytes 0-9/10`."""
    span, _, total = request.headers.get("content-range", "").removeprefix("bytes ").partition("/")
    return span.rpartition("-")[2] == str(int(total or 0) - 1)


def page_of(listing: dict, query: dict[str, str]) -> bytes:
    most = int(query.get("maxResults", 1000))
    items = [item for item in listing["items"] if item["name"] > query.get("pageToken", "")]
    more = {"nextPageToken": items[most - 1]["name"]} if len(items) > most else {}
    return json.dumps({**listing, "items": items[:most], **more}).encode()


def refusal(status: int, message: str) -> Reply:
    error = {"code": status, "message": message, "errors": [{"reason": message, "message": message}]}
    return Reply(status, {"content-type": "application/json"}, json.dumps({"error": error}).encode())


def get(path: str, like: Request, method: str = "GET") -> Request:
    return Request(method, path, {"host": like.headers.get("host", "127.0.0.1")}, b"")


@dataclass
class S3Rules:
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request, ask: Ask) -> Reply:
        if request.method in ("GET", "HEAD"):
            return ask(request)
        with self.lock:
            return self.answer(request, ask)

    def answer(self, request: Request, ask: Ask) -> Reply:
        digest = request.headers.get("content-md5")
        if digest and digest != base64.b64encode(hashlib.md5(request.body).digest()).decode():
            return s3_refusal(400, "BadDigest")
        wanted = request.headers.get("if-match")
        if wanted and request.method == "POST":
            found = ask(get(request.path.partition("?")[0], request, "HEAD"))
            if found.status != 200:
                return s3_refusal(404, "NoSuchKey")
            if found.headers["etag"] != wanted:
                return s3_refusal(412, "PreconditionFailed")
        return ask(request)


def s3_refusal(status: int, code: str) -> Reply:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said by the proxy</Message></Error>"
    return Reply(status, {"content-type": "application/xml"}, body.encode())
