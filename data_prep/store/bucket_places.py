"""What a gs:// or s3:// URL means."""

import re
from typing import NamedTuple

from data_prep.store.bucket_clients import gcs_client, s3_client
from data_prep.store.bucket_errors import BucketError
from data_prep.store.bucket_gcs import Gcs
from data_prep.store.bucket_s3 import S3
from data_prep.store.bucket_settings import patience_secs
from data_prep.store.bucket_store import Store
from data_prep.store.locations import describe, is_bucket
from data_prep.store.secrets import public_name, whole_url

MAX_KEY_BYTES = 1000  # of the stores' 1024: a name may get something appended
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._\-]{1,220}[a-z0-9]")


def join(url: str, *names: str) -> str:
    """Names below a URL.

    >>> join("gs://b/runs/", "1", "data.json")
    'gs://b/runs/1/data.json'
    """
    return "/".join((url.rstrip("/"), *(name.strip("/") for name in names)))


class Place(NamedTuple):
    store: Store
    scheme: str
    bucket: str
    key: str  # without a / at its end

    @property
    def below(self) -> str:
        return self.key + "/" if self.key else ""

    def url_of(self, key: str) -> str:
        return f"{self.scheme}://{self.bucket}/{key}"


def place_of(url: str, *, of_object: bool = False) -> Place:
    """BucketError: it is no URL of an object or directory, or the package for its kind is missing."""
    url = whole_url(url)
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    key = key.removesuffix("/")
    problem = ""
    if not is_bucket(url) or not _BUCKET.fullmatch(bucket):
        problem = "is no URL of a bucket; expected gs://BUCKET/NAME or s3://BUCKET/NAME"
    elif any(char in key for char in "?#\n\r"):
        problem = "has ? or # or a line break in it, which no name may have here"
    elif key and any(part in ("", ".", "..") for part in key.split("/")):
        problem = "has an empty part, or . or .. in its path; write it without"
    elif of_object and not key:
        problem = "is a whole bucket; name something in it"
    elif len(key.encode(errors="replace")) > MAX_KEY_BYTES:
        problem = f"has a name of more than {MAX_KEY_BYTES} bytes"
    if problem:
        raise BucketError(f"{' '.join(public_name(url).split())}: {problem}")
    patience_secs()  # a wrong setting is said as such
    try:
        store = S3(s3_client()) if scheme == "s3" else Gcs(gcs_client())
    except ImportError as error:
        raise BucketError(f"{url}: {error}") from None
    except Exception as error:  # whatever credentials and settings make of it
        raise BucketError(f"{url}: its client cannot be set up: {describe(error)}") from None
    return Place(store, scheme, bucket, key)
