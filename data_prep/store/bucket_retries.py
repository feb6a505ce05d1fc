"""When a request to a bucket is made again: the only place where that is decided."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from data_prep.store.bucket_errors import Failure
from data_prep.store.bucket_settings import SLOWEST_BYTES_PER_SEC, patience_secs, silence_secs

T = TypeVar("T")
LEAST_ATTEMPTS = 2  # also where the first one used up the time: a dead connection must not decide
FIRST_PAUSE_SECS = 0.5
LONGEST_PAUSE_SECS = 16.0


async def retried(attempt: Callable[[], Awaitable[T]], num_bytes: int = 0) -> T:
    """The result of the first attempt that does not fail transiently, with pauses that grow, and differ by chance.

    `num_bytes`: what an attempt carries. Raises Failure: another kind of it, or no time left.
    """
    from tenacity import (
        AsyncRetrying,
        before_sleep_log,
        retry_if_exception,
        stop_after_attempt,
        stop_after_delay,
        wait_random_exponential,
    )

    patience = patience_secs()
    allowed_secs = silence_secs() + num_bytes / SLOWEST_BYTES_PER_SEC

    async def bounded() -> T:
        try:
            return await asyncio.wait_for(attempt(), allowed_secs)
        except TimeoutError:
            raise Failure("transient", f"no answer within {allowed_secs:g} s") from None

    return await AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, Failure) and error.kind == "transient"),
        stop=stop_after_delay(patience) & stop_after_attempt(LEAST_ATTEMPTS),
        wait=wait_random_exponential(min(FIRST_PAUSE_SECS, patience / 20), min(LONGEST_PAUSE_SECS, patience / 4)),
        before_sleep=before_sleep_log(logging.getLogger(__name__), logging.INFO),
        reraise=True,
    )(bounded)
