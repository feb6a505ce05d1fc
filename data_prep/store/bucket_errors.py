"""What goes wrong with an object in a bucket, in one line with what to do."""

from typing import Literal

from data_prep.store.bucket_settings import PATIENCE
from data_prep.store.locations import InputError
from data_prep.store.secrets import hide_secrets, public_name


class BucketError(InputError):
    """An object or bucket that cannot be used; the message starts with its URL."""


class Changed(BucketError):
    """A precondition failed: somebody else wrote or removed the object."""


Kind = Literal[
    "transient",  # may go well in a moment
    "absent",  # no such object
    "no bucket",
    "changed",  # a precondition failed
    "credentials",  # none, or not accepted
    "denied",  # good credentials without the right
    "lost",  # an upload in parts that the store has forgotten, or wants begun anew
    "refused",  # anything else
]


class Failure(Exception):
    """What a store answered. Inside the modules of buckets only: their callers see a BucketError."""

    def __init__(self, kind: Kind, text: str):
        super().__init__(text)
        self.kind: Kind = kind
        self.text = hide_secrets(" ".join(text.split()))[:300]


EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
_LOG_IN = {
    "gcs": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "s3": "Run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_RIGHTS = {
    "gcs": "Ask the bucket's owner for roles/storage.objectUser",
    "s3": "Ask the bucket's owner for s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject",
}
_CREATE = {"gcs": "gcloud storage buckets create gs://{}", "s3": "aws s3 mb s3://{}"}


def in_words(url: str, doing: str, failure: Failure, patience_secs: float) -> BucketError:
    """`doing` as in "cannot be read"."""
    scheme, _, rest = url.partition("://")
    extra, bucket, url = EXTRAS[scheme], rest.partition("/")[0], public_name(url)
    match failure.kind:
        case "absent":
            return BucketError(f"{url}: no such object")
        case "no bucket":
            how = _CREATE[extra].format(bucket)
            return BucketError(f"{url}: there is no bucket {bucket}. Check its name, or create it: `{how}`")
        case "changed":
            return Changed(f"{url}: {failure.text}. Read it anew before deciding what to write")
        case "credentials":
            return BucketError(f"{url}: cannot be {doing}: {failure.text}. {_LOG_IN[extra]}")
        case "denied":
            return BucketError(f"{url}: cannot be {doing}: permission denied ({failure.text}). {_RIGHTS[extra]}")
        case "transient":
            return BucketError(
                f"{url}: cannot be {doing}, tried again for {patience_secs:g} s: {failure.text}. Try again later; "
                f"{PATIENCE} sets how many seconds it is tried"
            )
        case _:
            return BucketError(f"{url}: cannot be {doing}: {failure.text}")
