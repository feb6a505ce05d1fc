"""Google Cloud Storage: what bucket_store.py asks of it."""

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

from data_prep.store.bucket_errors import Failure
from data_prep.store.bucket_gcs_requests import Answer, Asking
from data_prep.store.bucket_store import WRITER, Entry, IfVersion, Page, Part, Put, check_length, expected_in_words

RIGHTS = ("storage.objects.create", "storage.objects.delete", "storage.objects.get", "storage.objects.list")


class Gcs:
    parts_at_once = 1  # a resumable upload goes in order
    wants_md5 = True

    def __init__(self, client: Any):
        self.asking = Asking(client)

    async def head(self, bucket: str, key: str) -> Entry | None:
        try:
            answer = await self.asking.ask("GET", _object(bucket, key))
        except Failure as failure:
            if failure.kind != "absent":
                raise
            if "No such object" not in failure.text:
                await self.page(bucket, key, recursive=True, most=1)  # says it where the bucket is missing
            return None
        return _entry(answer.json())

    async def page(self, bucket: str, prefix: str, *, recursive: bool, after: str = "", most: int = 1000) -> Page:
        fields = {"prefix": prefix, "maxResults": str(most), "pageToken": after, "delimiter": "" if recursive else "/"}
        query = {name: value for name, value in fields.items() if value}
        try:
            answer = (await self.asking.ask("GET", f"b/{quote(bucket, safe='')}/o", query)).json()
        except Failure as failure:
            if failure.kind == "absent":
                raise Failure("no bucket", failure.text) from None
            raise
        return Page([_entry(item) for item in answer.get("items", ())], answer.get("nextPageToken", ""))

    async def get(
        self, bucket: str, key: str, start: int = 0, num_bytes: int | None = None, version: str | None = None
    ) -> bytes:
        if num_bytes == 0:
            return b""
        query = {"alt": "media"} | ({"generation": version} if version else {})
        last = "" if num_bytes is None else start + num_bytes - 1
        headers = {"Range": f"bytes={start}-{last}"} if start or num_bytes is not None else {}
        try:
            answer = await self.asking.ask("GET", _object(bucket, key), query, headers, expect=(200, 206, 416))
        except Failure as failure:
            if failure.kind == "absent":
                there = await self.head(bucket, key)
                if there and version:
                    raise Failure("changed", expected_in_words(version)) from None
            raise
        if answer.status == 416:  # beyond the end
            return b""
        if answer.status == 206:
            total = int(answer.headers.get("Content-Range", "").rpartition("/")[2])
            end = total if num_bytes is None else min(total, start + num_bytes)
            return check_length(answer.body, max(0, end - start))
        if "Content-Encoding" in answer.headers:  # stored compressed: number and digest are of what was sent
            return answer.body[start:] if num_bytes is None else answer.body[start : start + num_bytes]
        content = check_length(answer.body, int(answer.headers.get("Content-Length", len(answer.body))))
        _check_digest(content, answer.headers.getall("x-goog-hash", []))  # pyright: ignore[reportAttributeAccessIssue]
        return content[start:] if num_bytes is None else content[start : start + num_bytes]

    async def put(self, put: Put, content: bytes) -> Entry:
        border = secrets.token_hex(16)
        kind = "application/octet-stream"
        head = f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(_resource(put))}\r\n"
        body = f"{head}--{border}\r\nContent-Type: {kind}\r\n\r\n".encode() + content + f"\r\n--{border}--\r\n".encode()
        headers = {"Content-Type": f"multipart/related; boundary={border}"}
        query = {"uploadType": "multipart"} | _condition(put.if_version)
        return await self._stored(put, self._upload("POST", self._upload_url(put, query), headers, body))

    async def begin(self, put: Put) -> str:
        headers = {
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": "application/octet-stream",
            "X-Upload-Content-Length": str(put.num_bytes),
        }
        url = self._upload_url(put, {"uploadType": "resumable"} | _condition(put.if_version))
        try:
            answer = await self._upload("POST", url, headers, json.dumps(_resource(put)).encode())
        except Failure as failure:
            _explain(failure, put.if_version)
        return answer.headers["Location"]

    async def part(self, put: Put, upload: str, part: Part, *, again: bool) -> Entry | None:
        """The object once this was the last one."""
        start, end = part.start, part.start + len(part.content)
        try:
            if again:  # how far the attempt that failed has come
                headers = {"Content-Range": f"bytes */{put.num_bytes}"}
                answer = await self._upload("PUT", upload, headers, b"", expect=(200, 201, 308))
                if answer.status != 308:
                    return self._checked(put, _entry(answer.json()))
                start = max(start, _received(answer))
            if start < end:
                headers = {"Content-Range": f"bytes {start}-{end - 1}/{put.num_bytes}"}
                body = part.content[start - part.start :]
                answer = await self._upload("PUT", upload, headers, body, expect=(200, 201, 308))
                if answer.status != 308:
                    return self._checked(put, _entry(answer.json()))
                if _received(answer) < end:
                    raise Failure("transient", f"{_received(answer)} bytes were taken, expected {end}")
        except Failure as failure:
            if failure.kind == "absent":
                raise Failure("lost", "the store no longer knows this upload") from None
            if failure.kind == "refused" and not again:
                # aiohttp sends again by itself over a new connection what an old one broke off, and the store may
                # have these bytes already. The next attempt asks it first.
                raise Failure("transient", failure.text) from None
            _explain(failure, put.if_version)
        return None

    async def finish(self, put: Put, upload: str, parts: Sequence[Part], answers: Sequence[Entry | None]) -> Entry:
        if (entry := answers[-1]) is None:
            raise Failure("lost", "the store has all bytes and shows no object")
        return entry

    async def abort(self, put: Put, upload: str) -> None:
        await self._upload("DELETE", upload, {}, b"", expect=(204, 499))

    async def remove(self, bucket: str, key: str, version: str | None) -> None:
        try:
            await self.asking.ask("DELETE", _object(bucket, key), _condition(version), expect=(200, 204))
        except Failure as failure:
            if failure.kind != "absent":
                _explain(failure, version)

    async def check_writable(self, bucket: str, key: str) -> None:
        query = [("permissions", right) for right in RIGHTS]
        try:
            answer = await self.asking.ask("GET", f"b/{quote(bucket, safe='')}/iam/testPermissions", query)
        except Failure as failure:
            if failure.kind == "absent":
                raise Failure("no bucket", failure.text) from None
            raise
        if lacking := [right for right in RIGHTS if right not in answer.json().get("permissions", ())]:
            kind = "credentials" if self.asking.is_anonymous() else "denied"
            raise Failure(kind, f"{' and '.join(lacking)} not granted{self.asking.who()}")

    async def _stored(self, put: Put, asked: Any) -> Entry:
        try:
            answer = await asked
        except Failure as failure:
            _explain(failure, put.if_version)
        return self._checked(put, _entry(answer.json()))

    def _checked(self, put: Put, entry: Entry) -> Entry:
        if entry.num_bytes != put.num_bytes:  # its digest was compared by the server
            raise Failure("transient", f"{entry.num_bytes} bytes were stored, expected {put.num_bytes}")
        return entry

    def _upload_url(self, put: Put, query: Mapping[str, str]) -> str:
        where = f"{self.asking.client._location}/upload/storage/v1/b/{quote(put.bucket, safe='')}/o"
        return f"{where}?{urlencode({**query, 'name': put.key})}"

    async def _upload(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, expect: tuple = (200, 201)
    ) -> Answer:
        try:
            return await self.asking.ask(method, url, (), headers, body, expect)
        except Failure as failure:
            if failure.kind == "absent" and method == "POST":
                raise Failure("no bucket", failure.text) from None
            raise


def _explain(failure: Failure, if_version: IfVersion) -> NoReturn:
    if failure.kind == "changed":
        raise Failure("changed", expected_in_words(if_version)) from None
    raise failure


def _object(bucket: str, key: str) -> str:
    return f"b/{quote(bucket, safe='')}/o/{quote(key, safe='')}"


def _condition(if_version: IfVersion) -> dict[str, str]:
    if if_version is None:
        return {}
    return {"ifGenerationMatch": "0" if if_version == "absent" else if_version}


def _resource(put: Put) -> dict[str, Any]:
    """With the digest that the server compares before the object appears."""
    digest = base64.b64encode(put.md5).decode()
    return {"name": put.key, "md5Hash": digest, "metadata": {WRITER: put.writer}}


def _entry(item: Mapping[str, Any]) -> Entry:
    try:
        writer = str((item.get("metadata") or {}).get(WRITER, ""))
        return Entry(str(item["name"]), int(item["size"]), str(item["generation"]), writer)
    except (KeyError, ValueError, TypeError):
        raise Failure("transient", "an answer that describes no object") from None


def _received(answer: Answer) -> int:
    """Of `Range: bytes=0-99`, which is left out where there is nothing yet."""
    last = answer.headers.get("Range", "").rpartition("-")[2]
    return int(last) + 1 if last else 0


def _check_digest(content: bytes, hashes: Sequence[str]) -> None:
    """Against `crc32c=...,md5=...` where the server says one."""
    import google_crc32c

    for each in ",".join(hashes).split(","):
        name, _, digest = each.strip().partition("=")
        if name == "crc32c" and base64.b64decode(digest) != google_crc32c.Checksum(content).digest():
            raise Failure("transient", "other bytes arrived than the object's CRC32C says")
