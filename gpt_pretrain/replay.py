"""Batches of a run again, without its model: `python -m gpt_pretrain.replay runs/quickstart --verify`.

Every batch follows from the run's plan and its datasets, so it can be read again at any time, at the speed of the
disk. `--verify` compares what is read with the ledger, the digests of what the run was trained on; `--against`
finds where two runs part, from their ledgers alone, and says which parameter it is.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.card.pages import short
from data_prep.pages.numbers import duration
from data_prep.pages.progress import Done, Progress
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.damage import explain
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.stages import Segment
from gpt_pretrain.history.differences import compare_runs
from gpt_pretrain.history.opened_run import NUMBERING, OpenedRun, add_data_dir

_CHUNK_TOKENS = 1 << 23  # what a process reads before it reports
_ANY_ID = 1 << 32  # an id out of range is a wrong digest like any other: it is not for us to stop there


class Replayed(NamedTuple):
    """One batch."""

    step: int  # of the plan, from 0
    position: int
    digest: int
    streams: list[str] | None  # of each row, where asked for
    windows: list[int] | None


def replay(
    run: OpenedRun, first: int, stop: int, *, with_rows: bool = False, num_workers: int = 1
) -> Iterator[list[Replayed]]:
    """Reads the batches of steps [first, stop) of the plan again, in order, some at a time.

    Args:
      with_rows: also stream and window of each row.
      num_workers: processes; decides nothing but the time it takes.

    Raises ValueError where a dataset is not there or is another one.
    """
    for segment, _, _ in (chunks := list(_chunks(run, first, stop))):
        run.sources(segment)  # what is wrong with them is said here, not in a process
    num_tokens = run.plan.tokens_before(stop) - run.plan.tokens_before(first)
    if num_workers < 2 or num_tokens < 2 * _CHUNK_TOKENS:  # over before a process has started
        yield from (_read(run, *chunk[1:], with_rows) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # the caller may have threads
    with concurrent.futures.ProcessPoolExecutor(
        min(num_workers, len(chunks)), context, _open_in_process, (run.save_dir, tuple(run.data_dirs))
    ) as pool:
        # Not all at once: finished parts would wait in memory for a slow reader.
        waiting = [pool.submit(_read_in_process, *chunk[1:], with_rows) for chunk in chunks[: 2 * num_workers]]
        for number in range(len(chunks)):
            yield waiting.pop(0).result()
            for chunk in chunks[number + 2 * num_workers :][:1]:
                waiting.append(pool.submit(_read_in_process, *chunk[1:], with_rows))


def _chunks(run: OpenedRun, first: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
    """Steps [first, stop) in pieces of about `_CHUNK_TOKENS`, none of which reaches into another segment."""
    while first < stop:
        segment = run.plan.segment_at(first)
        num_steps = max(1, _CHUNK_TOKENS // (run.plan.batch_size(first) * segment.seq_len))
        later = [each.from_step for each in run.plan.segments if each.from_step > first]
        end = min([first + num_steps, stop, *later])
        yield segment, first, end
        first = end


def _read(run: OpenedRun, first: int, end: int, with_rows: bool) -> list[Replayed]:
    segment = run.plan.segment_at(first)
    batches = Batches(run.sources(segment), run.plan, vocab_size=_ANY_ID, first_step=first, num_steps=end - first)
    names = [stream.name for stream in segment.streams]
    out = []
    for index in range(end - first):
        element = batches[index]
        streams = windows = None
        if with_rows:
            streams = [names[i] for i in element["streams"].reshape(-1).tolist()]
            windows = element["windows"].reshape(-1).tolist()
        out.append(Replayed(element["step"], element["position"], element["digest"], streams, windows))
    return out


_run_of_process: OpenedRun


def _open_in_process(save_dir: str, data_dirs: tuple[str, ...]) -> None:
    global _run_of_process
    _run_of_process = OpenedRun(save_dir, data_dirs)


def _read_in_process(first: int, end: int, with_rows: bool) -> list[Replayed]:
    return _read(_run_of_process, first, end, with_rows)


class _Progress(Progress):
    def line(self) -> str:
        """120 updates, 9.9 M tokens, 320 M tokens/s, 1:23 left"""
        updates, tokens, secs = self.done.work, self.done.tokens, self.seconds()
        left = (self.total_work - tokens) * secs / max(1, tokens)
        speed = f"{short(tokens)} tokens, {short(round(tokens / secs))} tokens/s"
        return f"{updates:,} updates, {speed}, {duration(left)} left"


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where all is as it should be, 1 for a difference or a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt_pretrain.replay",
        description=__doc__,
        epilog=NUMBERING,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="save_dir of a run")
    parser.add_argument("--from_step", type=int, metavar="A", help="first update (default 1)")
    parser.add_argument(
        "--to_step",
        type=int,
        metavar="B",
        help="last update (default: the last that the ledger has, or of the whole run where nothing is saved yet)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare with the ledger; name the damaged file if it differs"
    )
    parser.add_argument("--against", metavar="OTHER_RUN", help="where do the two runs part, and why? Reads no data")
    add_data_dir(parser)
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--list", action="store_true", help="print a line an update: number, position, digest")
    out.add_argument("--jsonl", action="store_true", help="print them as JSON, with stream and window of each row")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read (default %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        run = OpenedRun(args.run, args.data_dir)
        if args.against:
            return _compare(run, OpenedRun(args.against), args)
        return _replay(run, args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _compare(run: OpenedRun, other: OpenedRun, args) -> int:
    if args.verify or args.list or args.jsonl or args.from_step or args.to_step:
        raise ValueError("--against compares two ledgers from their beginning; give no other option but --data_dir")
    agree, lines = compare_runs(run, other)
    print("\n".join(lines))
    return 0 if agree else 1


def _replay(run: OpenedRun, args) -> int:
    ledger = Ledger.read(run.save_dir) if args.verify else run.ledger
    if args.verify and not len(ledger):
        raise ValueError(f"{run.save_dir}: its ledger has no update yet; there is nothing to verify")
    first = run.step_of(1 if args.from_step is None else args.from_step, "--from_step")
    stop = run.step_of(args.to_step or len(ledger) or run.data.num_steps, "--to_step") + 1
    if stop <= first:
        raise ValueError(f"--from_step {first + 1} --to_step {stop}: the first is after the last")
    if args.verify and stop > len(ledger):
        raise ValueError(f"--to_step {stop}: the ledger of {run.save_dir} ends at update {len(ledger)}")

    num_tokens = run.plan.tokens_before(stop) - run.plan.tokens_before(first)
    progress = _Progress("replay", num_tokens, in_tokens=True)
    unequal: list[Replayed] = []
    num_read, start = 0, time.monotonic()
    for part in replay(run, first, stop, with_rows=args.jsonl, num_workers=args.num_workers):
        for each in part:
            if args.list:
                print(f"{each.step + 1} {each.position} {each.digest:016x}")
            elif args.jsonl:
                fields = {"update": each.step + 1, **each._asdict(), "digest": f"{each.digest:016x}"}
                del fields["step"]
                print(json.dumps(fields, ensure_ascii=False))
            if args.verify and each.digest != int(ledger.digests[each.step]):
                unequal.append(each)
        num_read = run.plan.tokens_before(part[-1].step + 1) - run.plan.tokens_before(first)
        progress.set(Done(tokens=num_read, work=part[-1].step + 1 - first))
    progress.close()
    secs = time.monotonic() - start
    updates = f"updates {first + 1} to {stop}" if stop - first > 1 else f"update {stop}"
    speed = f"{short(num_read)} tokens in {secs:.1f} s, {short(round(num_read / max(secs, 1e-9)))} tokens/s"
    # Beside a list, what is said in words is not part of the list.
    stream = sys.stderr if args.list or args.jsonl else sys.stdout
    if unequal:
        print(_difference(run, unequal, ledger, stop - first), file=stream)
        return 1
    if args.verify:
        print(f"{run.save_dir}: {updates} are as the ledger says ({speed})", file=stream)
    else:
        advice = "compare them with the ledger: --verify" if len(ledger) else "none is in the ledger yet"
        print(f"{run.save_dir}: {updates} replayed ({speed}); {advice}", file=stream)
    return 0


def _difference(run: OpenedRun, unequal: list[Replayed], ledger: Ledger, num_steps: int) -> str:
    one = unequal[0]
    segment = run.plan.segment_at(one.step)
    datasets = {stream.name: run.dataset(stream) for stream in segment.streams}
    others = f" ({len(unequal)} of {num_steps} updates differ, the last is {unequal[-1].step + 1})"
    others = others if len(unequal) > 1 else ""
    return (
        f"DIFFERS: {run.save_dir}: the batch of update {one.step + 1} (position {one.position}) has the digest "
        f"{one.digest:016x}, the ledger says {int(ledger.digests[one.step]):016x}{others}.\n"
        + explain(run.plan, datasets, one.step)
    )


if __name__ == "__main__":
    sys.exit(main())
