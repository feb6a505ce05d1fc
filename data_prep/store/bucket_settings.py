"""How long a bucket is waited for."""

import os

PATIENCE = "GPT_PRETRAIN_BUCKET_PATIENCE_SECS"
DEFAULT_PATIENCE_SECS = 60.0
CONNECT_SECS = 10.0
SILENCE_SECS = 60.0  # of a server, after which an attempt is given up
SLOWEST_BYTES_PER_SEC = 1 << 18  # below it an attempt is given up, too


def patience_secs() -> float:
    """For how long what may go well in a moment is tried again."""
    text = os.environ.get(PATIENCE, "")
    try:
        secs = float(text or DEFAULT_PATIENCE_SECS)
        if not 0 < secs < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(f"{PATIENCE}={text!r}; expected a number of seconds above 0") from None
    return secs


def connect_secs() -> float:
    return min(CONNECT_SECS, patience_secs())


def silence_secs() -> float:
    return min(SILENCE_SECS, patience_secs())
