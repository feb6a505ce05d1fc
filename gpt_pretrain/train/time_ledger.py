"""Where the wall time of a run goes: each second belongs to exactly one category."""

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from jax import monitoring

from data_prep.pages.numbers import duration, plural

T = TypeVar("T")


class Category(enum.StrEnum):
    """What a second was spent on."""

    START = "start"  # the interpreter, imports, opening and building; and the way out
    RESTORE = "restore"  # choosing a checkpoint, verifying it, loading it
    COMPILE = "compile"  # tracing, lowering and compiling, of any function
    DATA = "waiting_for_data"
    STEP = "step"  # of steps that were kept: sending them, waiting for their results, and all else in the loop
    EVALUATION = "evaluation"
    STATISTICS = "statistics"
    CHECKPOINT = "blocked_on_checkpoint"
    WRITERS = "writers"
    LOST = "lost_by_a_crash"  # whatever it had been spent on, it was spent after the checkpoint that was resumed

    @property
    def words(self) -> str:
        return self.value.replace("_", " ")


Secs = dict[Category, float]


class TimeLedger:
    """Counts the seconds of a run by category: those of this session, from `began` on, and of earlier ones.

    One category counts at any time. It is START until a block says otherwise:

        with times.spent(Category.RESTORE):
            ...

    Blocks nest: the inner one counts, the outer one waits. Only the thread that made the ledger is accounted for;
    other threads may call everything, and only read.

    Args:
      began: when this session began, by `clock`; None for now.

    Attributes:
      num_sessions: starts of the program so far, this one included.
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.num_sessions = 1
        self._clock, self._thread, self._lock = clock, threading.get_ident(), threading.Lock()
        self._began = self._since = clock() if began is None else began
        self._secs: Secs = dict.fromkeys(Category, 0.0)
        self._category = Category.START
        self._step = 0
        self._checkpoints: dict[int, Secs] = {}
        self._checkpoint: int | None = None  # since which no step has begun

    def _switch(self, category: Category) -> Category:
        """Counts for `category` from here on; returns what counted until now."""
        with self._lock:
            before, now = self._category, self._clock()
            self._secs[before] += now - self._since
            self._category, self._since = category, now
        return before

    @contextlib.contextmanager
    def spent(self, category: Category) -> Iterator[None]:
        """The time of the block counts for `category`."""
        if threading.get_ident() != self._thread:
            yield
            return
        outer = self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each is there counts for DATA."""
        iterator, nothing = iter(items), object()
        while True:
            with self.spent(Category.DATA):
                item: Any = next(iterator, nothing)
            if item is nothing:
                return
            yield item

    def counted(self, thing: T, methods: Iterable[str], category: Category) -> T:
        """The same object, whose methods of these names count for `category`."""
        for name in methods:
            setattr(thing, name, self._counted(getattr(thing, name), category))
        return thing

    def _counted(self, method: Callable[..., Any], category: Category) -> Callable[..., Any]:
        def call(*args, **kwargs):
            with self.spent(category):
                return method(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def noting_compilation(self) -> Iterator[None]:
        """In the block, what JAX takes to trace, lower and compile counts for COMPILE, in whatever category it happens.

        JAX says itself when each of these begins and ends (`jax.monitoring`, the same in 0.10 and 0.12). Timing the
        first call for each shape would count the first step, too, where it does not run asynchronously, and miss what
        is compiled to make, restore or sample.
        """
        interrupted: list[Category] = []

        def begins(event: str, value: float, **_: Any) -> None:
            if event.startswith(_COMPILE_EVENTS) and threading.get_ident() == self._thread:
                interrupted.append(self._switch(Category.COMPILE))

        def ends(event: str, duration_secs: float, **_: Any) -> None:
            if interrupted and event.startswith(_COMPILE_EVENTS) and threading.get_ident() == self._thread:
                self._switch(interrupted.pop())

        monitoring.register_scalar_listener(begins)
        monitoring.register_event_duration_secs_listener(ends)
        try:
            yield
        finally:
            monitoring.unregister_event_duration_listener(ends)
            monitoring.unregister_scalar_listener(begins)

    def begin_step(self, step: int) -> None:
        """What is spent from here on belongs to this step, counted from 1, or to later ones."""
        if self._checkpoint is not None:
            with self._lock:
                self._checkpoints[self._checkpoint], self._checkpoint = self._now(), None
        self._step = step

    def at_checkpoint(self, step: int) -> None:
        """What was spent so far, and will be until the next step begins, is kept if the run is resumed from `step`."""
        self._checkpoint = step

    def add_earlier(self, secs: Secs, checkpoints: dict[int, Secs], num_sessions: int) -> None:
        """Goes on with what earlier sessions spent, and had spent at their checkpoints."""
        with self._lock:
            for category, each in secs.items():
                self._secs[category] += each
        self._checkpoints, self.num_sessions = dict(checkpoints), num_sessions + 1

    def _now(self) -> Secs:
        return self._secs | {self._category: self._secs[self._category] + self._clock() - self._since}

    @property
    def secs(self) -> Secs:
        """Of all sessions, by category: together the wall time of the run."""
        with self._lock:
            return self._now()

    @property
    def session_secs(self) -> float:
        """The wall time of this session."""
        return self._clock() - self._began

    @property
    def training_secs(self) -> float:
        """What steps and waiting for their data took, without all else."""
        secs = self.secs
        return secs[Category.STEP] + secs[Category.DATA]

    def snapshot(self) -> tuple[int, Secs, dict[int, Secs]]:
        """(the step under way, seconds now, seconds at checkpoints by their step)."""
        with self._lock:
            secs, checkpoints = self._now(), dict(self._checkpoints)
            if self._checkpoint is not None:
                checkpoints[self._checkpoint] = secs
            return self._step, secs, checkpoints

    def percentages(self) -> dict[str, float]:
        """For the curves: {"time_percent/step": ..., ...} of the run's wall time so far, and its goodput.

        Goodput is the share of steps that were kept; work that was lost has left their category.
        """
        secs = self.secs
        share = 100 / max(sum(secs.values()), 1e-9)
        values = {f"{CURVES}/{category}": each * share for category, each in secs.items()}
        return values | {f"{CURVES}/goodput": secs[Category.STEP] * share}

    def summary(self) -> str:
        """The run in a line: "2:31 in 2 sessions: step 86% (goodput), compile 5%, start 3%"."""
        secs = self.secs
        wall = sum(secs.values())
        percent = {category: round(100 * each / max(wall, 1e-9)) for category, each in secs.items()}
        goodput = f"step {percent.pop(Category.STEP)}% (goodput)"
        others = sorted((item for item in percent.items() if item[1]), key=lambda item: -item[1])
        words = [goodput, *(f"{category.words} {share}%" for category, share in others)]
        return f"{duration(wall)} in {plural(self.num_sessions, 'session')}: {', '.join(words)}"


CURVES = "time_percent"
_COMPILE_EVENTS = "/jax/core/compile/"
