"""Amazon S3 and what speaks its language, through the aiobotocore client of s3fs.

s3fs's own calls know no precondition but "absent", and retry for themselves; so this asks with the client that its
`set_session` gives.
"""

import base64
import hashlib
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NoReturn

from data_prep.store.bucket_errors import Failure
from data_prep.store.bucket_store import WRITER, Entry, IfVersion, Page, Part, Put, check_length, expected_in_words

TRANSIENT = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "BadDigest",  # damaged on its way
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeTooSlow",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIAL_CODES = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


class S3:
    parts_at_once = 4
    wants_md5 = False

    def __init__(self, client: Any):
        self.client = client

    async def head(self, bucket: str, key: str) -> Entry | None:
        try:
            found = await self._ask("head_object", Bucket=bucket, Key=key)
        except Failure as failure:
            if failure.kind != "absent":
                raise
            await self.page(bucket, key, recursive=True, most=1)  # HEAD doesn't say whether the bucket is missing
            return None
        return Entry(key, found["ContentLength"], _version(found), found.get("Metadata", {}).get(WRITER, ""))

    async def page(self, bucket: str, prefix: str, *, recursive: bool, after: str = "", most: int = 1000) -> Page:
        more: dict[str, str] = {"ContinuationToken": after} if after else {}
        if not recursive:
            more["Delimiter"] = "/"
        found = await self._ask("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=most, **more)
        entries = [Entry(item["Key"], item["Size"], _version(item)) for item in found.get("Contents", ())]
        return Page(entries, found.get("NextContinuationToken", "") if found.get("IsTruncated") else "")

    async def get(
        self, bucket: str, key: str, start: int = 0, num_bytes: int | None = None, version: str | None = None
    ) -> bytes:
        if num_bytes == 0:
            return b""
        more = {"IfMatch": f'"{version}"'} if version else {}
        if start or num_bytes is not None:
            more["Range"] = f"bytes={start}-" + ("" if num_bytes is None else str(start + num_bytes - 1))
        try:
            found, content = await self._read(Bucket=bucket, Key=key, **more)
        except Failure as failure:
            if failure.text.startswith("InvalidRange"):  # beyond the end
                return b""
            _explain(failure, version)
        if span := found.get("ContentRange"):
            total = int(span.rpartition("/")[2])
            end = total if num_bytes is None else min(total, start + num_bytes)
            return check_length(content, max(0, end - start))
        check_length(content, found["ContentLength"])
        _check_digest(found, hashlib.md5(content, usedforsecurity=False).hexdigest(), "arrived")
        return content[start:] if num_bytes is None else content[start : start + num_bytes]

    async def put(self, put: Put, content: bytes) -> Entry:
        found = await self._ask(
            "put_object",
            Bucket=put.bucket,
            Key=put.key,
            Body=content,
            ContentMD5=base64.b64encode(put.md5).decode(),  # which the server compares before the object appears
            Metadata={WRITER: put.writer},
            expected=put.if_version,
            **_condition(put.if_version),
        )
        _check_digest(found, put.md5.hex(), "were stored")
        return Entry(put.key, put.num_bytes, _version(found), put.writer)

    async def begin(self, put: Put) -> str:
        metadata = {WRITER: put.writer}
        found = await self._ask("create_multipart_upload", Bucket=put.bucket, Key=put.key, Metadata=metadata)
        return found["UploadId"]

    async def part(self, put: Put, upload: str, part: Part, *, again: bool) -> str:
        """Its ETag."""
        found = await self._ask(
            "upload_part",
            Bucket=put.bucket,
            Key=put.key,
            UploadId=upload,
            PartNumber=part.number,
            Body=part.content,
            ContentMD5=base64.b64encode(part.md5).decode(),
        )
        _check_digest(found, part.md5.hex(), "were stored")
        return _version(found)

    async def finish(self, put: Put, upload: str, parts: Sequence[Part], answers: Sequence[str]) -> Entry:
        named = [{"PartNumber": part.number, "ETag": f'"{etag}"'} for part, etag in zip(parts, answers, strict=True)]
        found = await self._ask(
            "complete_multipart_upload",
            Bucket=put.bucket,
            Key=put.key,
            UploadId=upload,
            MultipartUpload={"Parts": named},
            expected=put.if_version,
            **_condition(put.if_version),
        )
        return Entry(put.key, put.num_bytes, _version(found), put.writer)

    async def abort(self, put: Put, upload: str) -> None:
        await self._ask("abort_multipart_upload", Bucket=put.bucket, Key=put.key, UploadId=upload)

    async def remove(self, bucket: str, key: str, version: str | None) -> None:
        try:
            await self._ask("delete_object", Bucket=bucket, Key=key, expected=version, **_condition(version))
        except Failure as failure:
            if failure.kind != "absent":
                raise

    async def check_writable(self, bucket: str, key: str) -> None:
        """By an upload that is begun and given up: it needs the same right as a put, and nothing appears."""
        upload = (await self._ask("create_multipart_upload", Bucket=bucket, Key=key))["UploadId"]
        await self._ask("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)

    async def _read(self, **fields: Any) -> tuple[Mapping[str, Any], bytes]:
        async def whole(client: Any) -> tuple[Mapping[str, Any], bytes]:
            found = await client.get_object(**fields)
            async with found["Body"] as body:
                return found, await body.read()

        return await self._guarded(lambda client: whole(client))

    async def _ask(self, method: str, *, expected: IfVersion = None, **fields: Any) -> Mapping[str, Any]:
        try:
            return await self._guarded(lambda client: getattr(client, method)(**fields))
        except Failure as failure:
            if failure.kind == "absent" and expected not in (None, "absent") and method != "delete_object":
                failure = Failure("changed", failure.text)  # a put that expects a version, and there is none
            _explain(failure, expected)

    async def _guarded(self, request: Any) -> Any:
        import aiohttp
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        try:
            work: Awaitable = request(await self.client.set_session())
            return await work
        except exceptions.ClientError as error:
            raise _failure(error) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            raise Failure("credentials", str(error)) from None
        except (exceptions.CredentialRetrievalError, exceptions.TokenRetrievalError) as error:
            raise Failure("credentials", type(error).__name__) from None
        except exceptions.ProfileNotFound as error:
            raise Failure("credentials", str(error)) from None
        except (
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            ResponseParserError,
            aiohttp.ClientError,
            OSError,
        ) as error:  # of OSError: timeouts
            raise Failure("transient", f"{type(error).__name__}: {error}") from None
        except (exceptions.BotoCoreError, ValueError) as error:
            raise Failure("refused", f"{type(error).__name__}: {error}") from None


def _failure(error: Any) -> Failure:
    said = error.response.get("Error", {})
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(said.get("Code", ""))
    text = f"{code} {said.get('Message', '')}".strip()
    if code == "ConditionalRequestConflict":
        # Two at once. An upload in parts has to begin anew; for all else the next attempt decides.
        lost = error.operation_name == "CompleteMultipartUpload"
        return Failure("lost" if lost else "transient", text)
    if status in TRANSIENT or code in _TRANSIENT_CODES:
        return Failure("transient", text)
    if code == "NoSuchBucket":
        return Failure("no bucket", text)
    if code == "NoSuchUpload":
        return Failure("lost", text)
    if status == 412 or code == "PreconditionFailed":
        return Failure("changed", text)
    if status == 401 or code in _CREDENTIAL_CODES:
        return Failure("credentials", text)
    if status == 403:
        return Failure("denied", text)
    if status == 404:
        return Failure("absent", text)
    return Failure("refused", text)


def _explain(failure: Failure, if_version: IfVersion) -> NoReturn:
    if failure.kind == "changed":
        raise Failure("changed", expected_in_words(if_version)) from None
    raise failure


def _version(found: Mapping[str, Any]) -> str:
    return found["ETag"].strip('"')


def _condition(if_version: IfVersion) -> dict[str, str]:
    if if_version is None:
        return {}
    return {"IfNoneMatch": "*"} if if_version == "absent" else {"IfMatch": f'"{if_version}"'}


def _check_digest(found: Mapping[str, Any], md5: str, what: str) -> None:
    """Against the ETag, where that is an MD5: not of an object of several parts, nor under keys of KMS or a user."""
    etag = _version(found)
    by_key = found.get("ServerSideEncryption") not in (None, "AES256") or "SSECustomerAlgorithm" in found
    if len(etag) == 32 and not by_key and etag != md5:
        raise Failure("transient", f"other bytes {what}: MD5 {etag}, expected {md5}")
