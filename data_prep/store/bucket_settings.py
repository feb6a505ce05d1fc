"""How long a bucket is waited for."""

from data_prep.store.variables import positive_number

PATIENCE = "GPT_PRETRAIN_BUCKET_PATIENCE_SECS"
DEFAULT_PATIENCE_SECS = 60.0
CONNECT_SECS = 10.0
SILENCE_SECS = 60.0  # of a server, after which an attempt is given up
SLOWEST_BYTES_PER_SEC = 1 << 18  # below it an attempt is given up, too


def patience_secs() -> float:
    """For how long what may go well in a moment is tried again."""
    return positive_number(PATIENCE, DEFAULT_PATIENCE_SECS, "seconds")


def connect_secs() -> float:
    return min(CONNECT_SECS, patience_secs())


def silence_secs() -> float:
    return min(SILENCE_SECS, patience_secs())
