"""URLs without what only their user may know.

What an input is called, in a manifest, a table of documents, a note, a page, a log or an error, is its `public_name`.
It is stable: the same file with a new signature has the same one. `Location` is a text that is this name, whoever
prints or writes it, and still knows the whole URL for the one who fetches.
"""

import re
import urllib.parse

# Of a query only what says which file is meant. All else may be a key to it, whatever its name.
_OF_FILES = ("file", "filename", "id", "index", "name", "page", "part", "path", "shard", "split", "config", "format")
_OF_VERSIONS = ("branch", "generation", "ref", "revision", "snapshot", "v", "version", "versionid")
KEPT_PARAMETERS = frozenset((*_OF_FILES, *_OF_VERSIONS, "alt", "dl", "download", "raw"))
_MAX_KEPT_CHARS = 40  # of a value: a longer one may be a secret
_KEPT_VALUE = re.compile(rf"[\w.\- ]{{0,{_MAX_KEPT_CHARS}}}")
_URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.\-]*://[^\s'"<>`]+""")


class Location(str):
    """The public name of a URL, as text; `whole_url` gives the URL itself.

    >>> where = Location("https://me:pw@host/a.jsonl")
    >>> print(where, whole_url(where))
    https://host/a.jsonl https://me:pw@host/a.jsonl
    """

    __slots__ = ("_url",)

    def __new__(cls, url: str) -> "Location":
        self = super().__new__(cls, public_name(whole_url(url)))
        self._url = whole_url(url)
        return self

    def __reduce__(self):
        return Location, (self._url,)


def whole_url(path: str) -> str:
    """What to fetch: all of a `Location`'s URL; any other text as it is."""
    return path._url if isinstance(path, Location) else path


def public_name(path: str) -> str:
    """A path or URL without user name, password, signature and fragment.

    >>> public_name("https://me:secret@host/a.jsonl?version=2&X-Amz-Signature=0a1b")
    'https://host/a.jsonl?version=2'
    >>> public_name("texts/a#1?.jsonl")
    'texts/a#1?.jsonl'
    """
    if "://" not in path:
        return path
    return "::".join(_without_secrets(each) if "://" in each else each for each in path.split("::"))


def public_names(patterns: str) -> str:
    """The same of several, separated by commas."""
    return ",".join(map(public_name, patterns.split(","))) if "://" in patterns else patterns


def hide_secrets(text: str) -> str:
    """Every URL in a text without what is secret.

    >>> hide_secrets("GET 'https://me:pw@host/a?sig=1': 403")
    "GET 'https://host/a': 403"
    """

    def replaced(match: re.Match) -> str:
        url = match[0].rstrip(").,:;]}")
        return public_name(url) + match[0][len(url) :]

    return _URL.sub(replaced, text)


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if scheme in ("file", "embedded"):  # a path of this machine; its ? and # are letters
        return url
    address, _, query = rest.partition("#")[0].partition("?")
    host, slash, inner = address.partition("/")
    _, at, host_alone = host.rpartition("@")
    if not at and re.search(r":\D", host) and "@" in inner and not host.startswith("["):
        # A password with a slash: what looks like a port is none.
        host_alone, slash, inner = inner.rpartition("@")[2].partition("/")
    kept = [
        (name, value)
        for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True)
        if name.lower() in KEPT_PARAMETERS and _KEPT_VALUE.fullmatch(value)
    ]
    return f"{scheme}://{host_alone}{slash}{inner}" + ("?" + urllib.parse.urlencode(kept) if kept else "")
