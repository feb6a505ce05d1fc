"""Whether the network keeps up with training, where the data comes from a bucket."""

import logging

from data_prep.pages.numbers import short, size_text
from gpt_pretrain.data.fetching import FetchAhead
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.train.actions.action import Action
from gpt_pretrain.train.results import StepResult
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import Category, TimeLedger

log = logging.getLogger(__name__)

_MEASURED_STEPS = 10


class CompareNetwork(Action):
    """Says once, after some steps, what training takes and what the network gives."""

    counts_as = Category.STEP

    def __init__(self, start: Start, fetching: FetchAhead, times: TimeLedger):
        self._plan: Plan = start.plan
        self._first = start.step + 1  # its time is that of a beginning
        self._fetching, self._times = fetching, times
        self._before = (0, 0.0)  # tokens, and seconds of steps

    def on_result(self, result: StepResult) -> None:
        # What steps would take if their data were always there: waiting for it is left out.
        now = self._plan.tokens_before(result.step), self._times.secs[Category.STEP]
        if result.step == self._first:
            self._before = now
        elif result.step == self._first + _MEASURED_STEPS:
            self._say((now[0] - self._before[0]) / max(now[1] - self._before[1], 1e-9))

    def _say(self, tokens_per_sec: float) -> None:
        given, cost = self._fetching.bytes_per_sec, self._fetching.bytes_per_token
        if given is None or cost is None:
            return
        needed = tokens_per_sec * cost
        line = (
            f"Network: training takes {short(round(tokens_per_sec))} tokens/s, {cost:.2f} bytes fetched for each: "
            f"{size_text(round(needed))}/s; {size_text(round(given))}/s are given"
        )
        if needed <= given:
            log.info("%s: it keeps up", line)
        else:
            log.warning("%s: it does NOT keep up, steps wait for their data", line)
