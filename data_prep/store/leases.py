"""One holder at a time of a "directory" in a bucket.

    <directory>/.lease    JSON: who holds it, and how often it was renewed

It is written under the precondition that nobody else wrote it meanwhile, so of several contenders one gets it, and
renewed every quarter of `ttl`. A contender that sees no renewal for `ttl` by its own clock takes it over: the clocks of
two machines are never compared. A holder that was a process of this very machine and is dead is not waited for. A
holder that could not renew in time finds out before it commits what it writes: see `Lease.check`.

Other names than .lease are holds of their own on the same directory; `require_ended` keeps those apart that must not
be at the same time.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from data_prep.store import buckets
from data_prep.store.bucket_errors import BucketError, Changed
from data_prep.store.lease_holder import MOST_TTL_SECS, Holder
from data_prep.store.secrets import public_name
from data_prep.store.variables import positive_number

log = logging.getLogger(__name__)

FILE_NAME = ".lease"
ABSENT = "absent"  # what `if_version` says where there is none
TTL = "GPT_PRETRAIN_LEASE_SECS"
DEFAULT_TTL_SECS = 60.0
LOOKS = 20  # within a ttl
RELEASE_SECS = 5.0  # of a process that may have to end soon


class InUse(BucketError):
    """Somebody else holds the directory. `names`: of the leases that are held."""

    def __init__(self, text: str, names: Sequence[str] = ()):
        super().__init__(text)
        self.names = tuple(names)


class LeaseLost(BucketError):
    """The directory is not ours any more: what is written there now would mix with what another one writes."""


def ttl_secs() -> float:
    """After how long without a renewal a holder counts as gone."""
    return positive_number(TTL, DEFAULT_TTL_SECS, "seconds", most=MOST_TTL_SECS)


def _clock() -> float:
    """Seconds, which pass also while the machine sleeps."""
    # macOS has no CLOCK_BOOTTIME; its CLOCK_MONOTONIC does not stop in sleep.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """A directory that this process holds; `hold` makes it. Any thread may call everything."""

    def __init__(self, url: str, holder: Holder, version: str, renewed: float):
        self._url = url
        self.directory, _, self._name = public_name(url).rpartition("/")
        self._holder, self._version, self._renewed = holder, version, renewed
        self._lost = ""
        self._lock, self._ends = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    @property
    def num_renewals(self) -> int:
        return self._holder.num_renewals

    @property
    def sign(self) -> "Sign":
        """By which processes elsewhere see whether this holding goes on."""
        return Sign(self._url, self._holder.token)

    def check(self) -> None:
        """Call it before what is written becomes what counts: after it, nobody else gets the directory for `ttl / 2`.

        Raises:
          LeaseLost: somebody else has the directory, or had it.
          BucketError: that cannot be found out now.
        """
        self.check_known()
        if _clock() - self._renewed > self._holder.ttl_secs / 2:
            self._renew(unless_since=self._holder.ttl_secs / 2)

    def check_known(self) -> None:
        """The same as far as this process knows it: asks nobody, and never waits."""
        if self._lost:
            raise LeaseLost(self._lost)

    def _keep(self) -> None:
        pause_secs, is_failing = self._holder.ttl_secs / 4, False
        while not self._ends.wait(pause_secs):
            try:
                self._renew()
            except LeaseLost:
                return  # `check` says it
            except BucketError as error:
                if not is_failing:
                    log.warning("The hold on %s cannot be renewed: %s. It is tried on.", self.directory, error)
                is_failing = True
            else:
                if is_failing:
                    log.warning("The hold on %s is renewed again; nobody else had it.", self.directory)
                is_failing = False

    def _renew(self, unless_since: float = 0.0) -> None:
        with self._lock:
            self.check_known()
            if _clock() - self._renewed <= unless_since:  # another thread did it while this one waited
                return
            for _ in range(3):
                now = _clock()  # before the request: afterwards it may have been there for long
                # Counts also where the answer gets lost: the same content must not come twice.
                self._holder = dataclasses.replace(self._holder, num_renewals=self._holder.num_renewals + 1)
                try:
                    written = buckets.write(self._url, self._holder.to_bytes(), if_version=self._version)
                except Changed:
                    self._version = self._ours()
                else:
                    self._version, self._renewed = written.version, now
                    return
            raise BucketError(f"{self._url}: is changed faster than it can be renewed")

    def _ours(self) -> str:
        """The version, if the lease there is one of this holding: a renewal that succeeded and seemed to fail.

        Raises LeaseLost otherwise.
        """
        found = buckets.stat(self._url)
        holder = None
        if found is not None:
            with contextlib.suppress(BucketError):
                holder = Holder.from_bytes(buckets.read(self._url))
        if found is not None and holder is not None and holder.token == self._holder.token:
            return found.version
        whose = f"is now held by {holder}" if holder else f"was removed, or its {self._name} was"
        self._lost = (
            f"{self.directory}: {whose}, as this process ({self._holder}) did not renew its hold in time. Stopped; "
            "nothing more is written there."
        )
        raise LeaseLost(self._lost)

    def release(self) -> None:
        """Lets others in at once; where that fails or takes long, they get in when `ttl` is over."""
        self._ends.set()
        releasing = threading.Thread(target=self._release, daemon=True, name="lease-release")
        releasing.start()
        releasing.join(RELEASE_SECS)
        if releasing.is_alive():
            secs = self._holder.ttl_secs
            log.warning("%s does not answer: the next one there waits for %g s.", self.directory, secs)

    def _release(self) -> None:
        self._thread.join()
        if self._lost:
            return
        try:
            with contextlib.suppress(Changed):
                buckets.remove(self._url, if_version=self._version)
                return
            with contextlib.suppress(LeaseLost):
                buckets.remove(self._url, if_version=self._ours())
        except BucketError as error:
            log.warning("%s; the next one there waits for %g s.", error, self._holder.ttl_secs)


@dataclasses.dataclass(frozen=True)
class Sign:
    """Of one holding of a lease: its object and its token."""

    url: str
    token: str

    def is_there(self) -> bool:
        """Whether the lease is still of that holding. One whose process was killed is, until somebody takes it over.

        Raises BucketError: that cannot be found out now.
        """
        holder = _read(self.url)
        return holder is not None and holder.token == self.token


@contextlib.contextmanager
def hold(
    directory: str, *, what: str = "run", name: str = FILE_NAME, say: Callable[[str], None] = log.warning
) -> Iterator[Lease]:
    """Keeps all others out of a "directory" in a bucket for the block.

        with hold("gs://b/run") as lease:
            ...
            lease.check()
            buckets.write("gs://b/run/done.json", ...)

    Args:
      what: the other holder would be.
      name: of the object. Only those who want the same one keep each other out.
      say: is told, at most once, how long it is waited.

    Raises:
      InUse: somebody holds it who is alive.
      BucketError: the bucket cannot be used.
    """
    lease = _take(directory, name, what, say)
    try:
        yield lease
    finally:
        lease.release()


def require_ended(directory: str, names: Iterable[str], say: Callable[[str], None] = log.warning) -> None:
    """Returns when none of these leases of a directory is anybody's, and removes those of dead holders.

    Of two processes that each hold a lease before they ask for the other's, at least one is told. A holder that was
    only silent finds its lease removed, as `Lease.check` says.

    Raises InUse, whose `names` are the leases of which a holder is alive, as far as is known by then.
    """
    watched = {name: _Watch(buckets.join(directory, name)) for name in names}
    waiting = False
    while watched:
        found = {name: watch.look() for name, watch in watched.items()}
        if held := [name for name, state in found.items() if state == "held"]:
            holder = watched[held[0]].holder
            raise InUse(f"{public_name(directory)}: {', '.join(held)} is held ({holder or 'by an unknown one'})", held)
        for name in [name for name, state in found.items() if state == "free"]:
            with contextlib.suppress(Changed):  # then it is looked at again
                if watched[name].version != ABSENT:
                    buckets.remove(watched[name].url, if_version=watched[name].version)
                del watched[name]
        if silent := [watch for name, watch in watched.items() if found[name] == "unknown"]:
            if not waiting:
                silent[0].say_wait(say)
            waiting = True
            time.sleep(min(watch.pause_secs for watch in silent))


class _Watch:
    """A lease of somebody else, looked at again and again until it is known whether its holder is alive."""

    def __init__(self, url: str):
        self.url = url
        self.holder: Holder | None = None
        self.version = ""  # there now, or ABSENT
        self._secs = self._own_secs = ttl_secs()
        self._watched, self._since = "", 0.0  # the version that is to be renewed, and since when

    def look(self) -> Literal["free", "held", "unknown"]:
        found = buckets.stat(self.url)
        looked = _clock()  # the version is at least that old
        if found is None:
            self.version = ABSENT
            return "free"
        self.version = found.version
        if found.version != self._watched:
            self.holder = _read(self.url)
            self._secs = max(self._own_secs, self.holder.ttl_secs if self.holder else 0.0)
        if self.holder is not None and self.holder.is_dead:
            return "free"
        if found.version == self._watched and looked - self._since >= self._secs:
            return "free"
        if self._watched and found.version != self._watched:
            return "held"
        if not self._watched:
            self._watched, self._since = found.version, looked
        return "unknown"

    @property
    def pause_secs(self) -> float:
        return min(self._secs / LOOKS, max(0.0, self._since + self._secs - _clock()))

    def say_wait(self, say: Callable[[str], None]) -> None:
        where, _, name = public_name(self.url).rpartition("/")
        which = "" if name == FILE_NAME else f", {name},"
        say(
            f"{where} is held{which} by {self.holder or 'somebody'}: waiting for at most {self._secs:g} s to see "
            "whether it is alive."
        )


def _take(directory: str, name: str, what: str, say: Callable[[str], None]) -> Lease:
    url = buckets.join(directory, name)
    us, watch = Holder.this_process(ttl_secs()), _Watch(url)
    waiting = False
    while True:
        match watch.look():
            case "held":
                raise InUse(
                    f"{public_name(directory)}: another {what} is using it ({watch.holder or 'an unknown one'}). Wait "
                    "for its end, or choose another directory."
                )
            case "free":
                now = _clock()
                # Else somebody was faster; or the last renewal of a dead process came late.
                with contextlib.suppress(Changed):
                    written = buckets.write(url, us.to_bytes(), if_version=watch.version)
                    return Lease(url, us, written.version, now)
            case "unknown":
                if not waiting:
                    watch.say_wait(say)
                waiting = True
                time.sleep(watch.pause_secs)


def _read(url: str) -> Holder | None:
    """None: no lease that somebody could renew, or none at all any more."""
    try:
        return Holder.from_bytes(buckets.read(url, 0, 1 << 16))
    except BucketError:
        if buckets.stat(url) is None:  # released meanwhile
            return None
        raise
