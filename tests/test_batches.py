import dataclasses
import itertools

import numpy as np
import pytest

from data_prep.store import token_bin, token_records
from data_prep.store.token_sources import BinSource, RecordSource
from gpt_pretrain.data import batches as batches_lib
from gpt_pretrain.data.batches import Batches, HostBatch, digest_of_rows, read_windows
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream

SEQ_LEN = 4


class Source:
    """A stream whose token `i` is `first + i`."""

    def __init__(self, num_tokens, first=0, dtype=np.uint16):
        self.tokens = (first + np.arange(num_tokens)).astype(dtype)
        self.num_tokens, self.dtype = num_tokens, np.dtype(dtype)

    def read(self, starts, length):
        return self.tokens[np.asarray(starts)[:, None] + np.arange(length)]


def sources_of() -> dict[str, Source]:
    return {"web": Source(1001, 0), "code": Source(801, 10_000), "books": Source(401, 20_000)}


def plan_of(batch_size=((0, 8), (20, 12)), shuffle="global") -> Plan:
    """A mixture of three streams that changes at step 30."""
    sources = sources_of()
    streams = [Stream(name, f"fingerprint of {name}", sources[name].num_tokens) for name in sources]
    counts = zip(streams, (5, 3, 2), strict=True)
    mixed = tuple(Stream(stream.name, stream.fingerprint, stream.num_tokens, count) for stream, count in counts)
    first = Stage(seed=0, seq_len=SEQ_LEN, batch_sizes=batch_size, streams=mixed, shuffle=shuffle)
    then = Stage(seed=0, seq_len=7, batch_sizes=batch_size, streams=tuple(streams[:2]), shuffle=shuffle)
    return Plan((first,)).continued(then, 30)


def make(first_index=0, num_steps=60, sources=None, plan=None, vocab_size=50257, **rows) -> Batches:
    return Batches(
        sources or sources_of(),
        plan or plan_of(),
        vocab_size=vocab_size,
        first_index=first_index,
        num_steps=num_steps,
        **rows,
    )


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(HostBatch))


def test_a_batch_is_the_plans_batch_with_its_tokens():
    plan, sources, batches = plan_of(), sources_of(), make()
    for step in (0, 7, 20, 29, 30, 59):
        stage, batch, element = plan.stage_at(step), plan.batch(step), batches[step]
        assert (element.step_index, element.position) == (step, batch.position)
        assert element.tokens.shape == (1, plan.batch_size(step), stage.seq_len + 1)
        assert np.array_equal(element.windows[0], batch.windows)
        assert np.array_equal(element.streams[0], batch.streams)
        for row, (stream, window) in enumerate(zip(batch.streams, batch.windows, strict=True)):
            start = window * stage.seq_len
            expected = sources[stage.streams[stream].name].tokens[start : start + stage.seq_len + 1]
            assert np.array_equal(element.tokens[0, row], expected)


def test_batches_do_not_depend_on_the_order_of_access_nor_on_where_one_begins():
    whole = [make()[step] for step in range(60)]  # each from a fresh look-up
    batches, late = make(), make(first_index=17, num_steps=43)
    assert all(same(each, whole[step]) for step, each in enumerate(batches))
    for step in np.random.default_rng(0).permutation(60).tolist():
        assert same(batches[step], whole[step])
    for step in itertools.chain(*zip(range(17, 38), range(59, 38, -1), strict=True)):
        assert same(late[step - 17], whole[step])


@pytest.mark.parametrize("chunk_examples", [1, 9, 100, 1000])
def test_batches_do_not_depend_on_how_many_are_looked_up_at_once(monkeypatch, chunk_examples):
    whole = list(make())
    monkeypatch.setattr(batches_lib, "_CHUNK_EXAMPLES", chunk_examples)
    assert all(same(a, b) for a, b in zip(make(), whole, strict=True))


def test_there_are_as_many_batches_as_steps():
    batches = make(first_index=5, num_steps=3)
    assert len(batches) == 3 and [each.step_index for each in batches] == [5, 6, 7]
    for index in (3, -1):
        with pytest.raises(IndexError):
            batches[index]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_digests_of_all_processes_add_up_to_the_batchs(num_processes):
    def rows_of(process):
        # Each process holds a slice of both microbatches.
        return lambda size: np.split(np.arange(size).reshape(2, -1), num_processes, axis=1)[process]

    whole = make(plan=plan_of(((0, 8), (20, 16))))
    parts = [make(plan=plan_of(((0, 8), (20, 16))), rows_of=rows_of(process)) for process in range(num_processes)]
    for step in range(60):
        elements = [part[step] for part in parts]
        assert sum(each.digest for each in elements) % 2**64 == whole[step].digest
        rows = np.concatenate([each.tokens for each in elements], axis=1)
        assert np.array_equal(rows.reshape(whole[step].tokens.shape), whole[step].tokens)


def test_a_digest_tells_one_token_window_position_stream_or_swapped_rows_from_another():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50257, (6, 9)).astype(np.uint16)
    positions, streams, windows = np.arange(100, 106), np.array([0, 1, 0, 2, 1, 0]), rng.integers(0, 1000, 6)
    plain = digest_of_rows(tokens, positions, streams, windows)
    assert 0 <= plain < 2**64

    others = [digest_of_rows(tokens[:5], positions[:5], streams[:5], windows[:5])]
    for row, column in itertools.product(range(6), range(9)):
        changed = tokens.copy()
        changed[row, column] ^= 1
        others.append(digest_of_rows(changed, positions, streams, windows))
    for row in range(6):
        one = np.eye(6, dtype=np.int64)[row]
        others.append(digest_of_rows(tokens, positions + one, streams, windows))
        others.append(digest_of_rows(tokens, positions, streams + one, windows))
        others.append(digest_of_rows(tokens, positions, streams, windows + one))
    others.append(digest_of_rows(tokens, positions + 1, streams, windows))
    swapped = np.array([1, 0, 2, 3, 4, 5])
    others.append(digest_of_rows(tokens[swapped], positions, streams, windows))
    others.append(digest_of_rows(tokens[swapped], positions, streams[swapped], windows[swapped]))
    assert plain not in others and len(set(others)) == len(others)
    # The order in which rows are listed, each with its own place, makes no difference: processes differ in it.
    listed = rng.permutation(6)
    assert digest_of_rows(tokens[listed], positions[listed], streams[listed], windows[listed]) == plain


def test_a_digest_does_not_depend_on_the_storage_format(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 1001).astype(np.uint16)
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, part in zip(paths, (tokens[:333], tokens[333:]), strict=True):
        token_bin.write_tokens(path, [part], len(part))
    token_records.write_records(tmp_path / "records", [tokens], len(tokens), record_tokens=64)
    plan = Plan((Stage(seed=0, seq_len=4, batch_sizes=((0, 16),), streams=(Stream("", "f", 1001),)),))
    sources = BinSource(paths), RecordSource([tmp_path / "records"], 64, 1001)
    assert [source.dtype for source in sources] == [np.uint16, np.uint16]
    a, b = (list(make(sources={"": source}, plan=plan, num_steps=20)) for source in sources)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("names", [("narrow", "wide"), ("wide", "narrow")])
def test_streams_of_different_width_are_not_cut_and_every_batch_is_as_wide(names):
    sources = {"narrow": Source(401, 100), "wide": Source(401, 100_000, np.uint32)}
    counts = {"narrow": 9, "wide": 1}
    streams = tuple(Stream(name, name, 401, counts[name]) for name in names)
    plan = Plan((Stage(seed=0, seq_len=4, batch_sizes=((0, 2),), streams=streams),))
    batches = make(sources=sources, plan=plan, num_steps=30, vocab_size=200_000)
    num_narrow_only = 0
    for element in batches:
        wide = element.streams == names.index("wide")
        num_narrow_only += not wide.any()
        assert element.tokens.dtype == np.uint32
        assert np.array_equal(element.tokens[..., 0], element.windows * 4 + np.where(wide, 100_000, 100))
    assert num_narrow_only > 10
    # So parts of a batch add up, whichever process holds the wide row.
    parts = [
        make(sources=sources, plan=plan, num_steps=30, vocab_size=200_000, rows_of=lambda _, r=r: np.array([[r]]))
        for r in (0, 1)
    ]
    for element, *halves in zip(batches, *parts, strict=True):
        assert sum(half.digest for half in halves) % 2**64 == element.digest


def test_one_stream_of_uint32_stays_uint32():
    plan = Plan((Stage(seed=0, seq_len=4, batch_sizes=((0, 2),), streams=(Stream("", "f", 401),)),))
    element = make(sources={"": Source(401, 100_000, np.uint32)}, plan=plan, vocab_size=200_000)[0]
    assert element.tokens.dtype == np.uint32
    assert np.array_equal(element.tokens[..., 0], element.windows * 4 + 100_000)


def test_no_rows_have_no_tokens_and_digest_zero():
    element = make(rows_of=lambda _: np.empty((2, 0), np.int64))[0]
    assert element.tokens.shape == (2, 0, SEQ_LEN + 1) and element.digest == 0
    stage = plan_of().stages[0]
    assert read_windows(sources_of(), stage, np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0, SEQ_LEN + 1)


def test_a_token_id_outside_the_vocabulary_is_an_error_that_names_stream_and_window():
    sources = sources_of()
    sources["code"].tokens[402] = 60_000  # of window 100 at seq_len 4
    with pytest.raises(
        ValueError,
        match=r"code: window 100 \(tokens 400 to 404 of the stream\) holds token id 60000, expected ids below 50257",
    ):
        list(make(sources=sources, num_steps=100, plan=Plan(plan_of().stages[:1])))
    plan = Plan((Stage(seed=0, seq_len=4, batch_sizes=((0, 8),), streams=(Stream("", "f", 801),)),))
    with pytest.raises(ValueError, match=r"^window 100 "):
        list(make(sources={"": sources["code"]}, plan=plan))


def test_block_shuffle_has_whole_blocks_fetched_once_and_before_they_are_read():
    fetched, source = [], Source(64 * 8 * 10 + 1)
    source.fetch_ahead = lambda starts, length: fetched.extend((int(start), length) for start in starts)
    stream = Stream("", "f", source.num_tokens)
    shuffle = {"shuffle": "block", "block_windows": 64, "group_blocks": 2}
    plan = Plan((Stage(seed=0, seq_len=8, batch_sizes=((0, 16),), streams=(stream,), **shuffle),))
    batches = Batches({"": source}, plan, vocab_size=1 << 32, num_steps=40)
    for step in range(40):
        windows = batches[step].windows
        assert set((windows.reshape(-1) // 64).tolist()) <= {start // (64 * 8) for start, _ in fetched}
    assert sorted(start for start, _ in fetched) == [64 * 8 * block for block in range(10)]
    assert {length for _, length in fetched} == {64 * 8 + 1}
