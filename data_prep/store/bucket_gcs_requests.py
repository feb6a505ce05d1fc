"""Requests of Google Cloud Storage's JSON API, through the session and credentials of gcsfs.

gcsfs's own calls know no preconditions but "absent", retry for themselves, and make one kind of error of many. So this
takes from it the session (`_set_session`) and the headers with a fresh token (`_get_headers`), and asks by itself.
"""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from data_prep.store.bucket_errors import Failure

TRANSIENT = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body)
        except ValueError:
            raise Failure("transient", "an answer that is not JSON") from None
        return found if isinstance(found, dict) else {}


class Asking:
    def __init__(self, client: Any):
        self.client = client

    async def ask(
        self,
        method: str,
        path: str,
        query: Any = (),
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        expect: tuple = (200,),
    ) -> Answer:
        import aiohttp
        from yarl import URL

        url = path if path.startswith("http") else self.client.base + path
        if query:
            url += "?" + urlencode(query)
        try:
            session = await self.client._set_session()
            headers = await self._signed(dict(headers or {}))
            request = session.request(method, URL(url, encoded=True), headers=headers, data=body, allow_redirects=False)
            async with request as response:
                answer = Answer(response.status, response.headers, await response.read())
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise Failure("refused", f"{type(error).__name__}: STORAGE_EMULATOR_HOST is no address") from None
        except (aiohttp.ClientError, OSError) as error:  # of OSError: timeouts
            raise Failure("transient", f"{type(error).__name__}: {error}") from None
        if answer.status not in expect:
            raise self._failure(answer)
        return answer

    async def _signed(self, headers: dict[str, str]) -> dict[str, str]:
        import google.auth.exceptions

        if self.is_anonymous():
            return self.client._get_headers(headers)
        try:  # may ask for a new token, which blocks
            return await asyncio.to_thread(self.client._get_headers, headers)
        except Exception as error:  # of google.auth, requests, or gcsfs around them
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, google.auth.exceptions.TransportError) or getattr(cause, "retryable", False):
                    raise Failure("transient", f"no token: {type(cause).__name__}") from None
                cause = cause.__cause__
            raise Failure("credentials", f"Google refused the credentials ({type(error).__name__})") from None

    def _failure(self, answer: Answer) -> Failure:
        try:
            error = json.loads(answer.body)["error"]
            message = str(error.get("message", ""))
            reason = str((error.get("errors") or [{}])[0].get("reason", ""))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            message, reason = answer.body[:200].decode(errors="replace"), ""
        text = f"{answer.status} {message or reason}".strip()
        match answer.status:
            case 403 if reason in ("rateLimitExceeded", "userRateLimitExceeded"):
                return Failure("transient", text)
            case 400 if "doesn't match calculated" in message:  # damaged on its way
                return Failure("transient", text)
            case 404 if "bucket does not exist" in message:
                return Failure("no bucket", text)
            case 404 | 410:
                return Failure("absent", text)
            case 304 | 412:
                return Failure("changed", text)
            case 401:
                return Failure("credentials", text + self.who())
            case 403:
                return Failure("credentials" if self.is_anonymous() else "denied", text + self.who())
            case status if status in TRANSIENT:
                return Failure("transient", text)
        return Failure("refused", text)

    def is_anonymous(self) -> bool:
        return self.client.credentials.credentials is None

    def who(self) -> str:
        if not self.is_anonymous():
            return ""
        file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        return f"; no Google credentials were found{f', nor are they in {file}' if file else ''}"
