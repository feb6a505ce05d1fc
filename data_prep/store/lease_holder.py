"""Who holds a lease: a process, and whether it is certain that it has ended."""

import dataclasses
import datetime
import json
import os
import secrets
import socket
from pathlib import Path

from data_prep.store.typed import Count, typed

VERSION = 1
MOST_TTL_SECS = 3600.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a lease says.

    Attributes:
      token: of this holding; nobody else's is the same.
      num_renewals: so far. Makes each renewal another content: S3 gives equal contents equal versions.
      ttl_secs: what the holder goes by.
      host, pid, since: for people.
      machine: boot and PID namespace: where a pid means the same process; "" where that cannot be known.
      process_began: in clock ticks since the boot: a pid comes again.
    """

    token: str
    num_renewals: Count
    ttl_secs: float
    host: str
    pid: Count
    since: str
    machine: str
    process_began: Count

    @classmethod
    def this_process(cls, ttl_secs: float) -> "Holder":
        pid, now = os.getpid(), datetime.datetime.now(datetime.UTC)
        since = f"{now:%Y-%m-%d %H:%M:%S} UTC"
        return cls(
            secrets.token_hex(16), 0, ttl_secs, socket.gethostname(), pid, since, _machine(), _process_began(pid) or 0
        )

    def to_bytes(self) -> bytes:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Holder | None":
        """None for what no holder has written: nobody renews it, so it does not count for long."""
        try:
            fields = json.loads(content)
            if not isinstance(fields, dict) or fields.pop("version", None) != VERSION:
                return None
            holder = typed(cls, fields, "")
        except (ValueError, RecursionError):
            return None
        return holder if 0 < holder.ttl_secs <= MOST_TTL_SECS else None

    @property
    def is_dead(self) -> bool:
        """Whether it is certain that its process has ended: only for one of this machine."""
        if not self.machine or self.machine != _machine() or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        began = _process_began(self.pid)
        return began is not None and began != self.process_began

    def __str__(self) -> str:
        host, since = (_one_line(text) for text in (self.host, self.since))
        return f"process {self.pid} of {host}, since {since}"


def _one_line(text: str) -> str:
    return "".join(char for char in text if char.isprintable())[:60]


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_began(pid: int) -> int | None:
    """None where that cannot be seen; 0 for a process that has ended and waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
