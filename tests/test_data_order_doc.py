"""docs/data-order.md against the code, by a second implementation made from that page alone: it imports nothing of ours."""

import dataclasses
import hashlib
import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import xxhash

from gpt_pretrain.data import asked_edits, edits, mixture, order, plan, stages
from gpt_pretrain.data.batches import Batches, digest_of_rows, kept_targets_of
from gpt_pretrain.data.ledger import Ledger

PAGE = (Path(__file__).parents[1] / "docs" / "data-order.md").read_text()
U64 = 2**64

# ---- The page in plain Python ----


def page_key(seed, epoch, part, stream):
    text = f"order/{seed}/{epoch}/{part}/{stream}"
    digest = hashlib.blake2b(text.encode(), digest_size=48).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]


def page_round(x, k, h):
    x = (x + k) % U64
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD % U64
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 % U64
    return x >> (64 - h)


def page_half_bits(size):
    return max(1, ((size - 1).bit_length() + 1) // 2)


def page_encrypt(v, h, keys):
    left, right = v >> h, v & ((1 << h) - 1)
    for k in keys:
        left, right = right, left ^ page_round(right, k, h)
    return (left << h) | right


def page_decrypt(v, h, keys):
    left, right = v >> h, v & ((1 << h) - 1)
    for k in reversed(keys):
        left, right = right ^ page_round(left, k, h), left
    return (left << h) | right


def page_permute(i, size, keys, step=page_encrypt):
    v = step(i, page_half_bits(size), keys)
    while v >= size:
        v = step(v, page_half_bits(size), keys)
    return v


def page_window(n, *, num_windows, seed, stream, shuffle, block_windows, group_blocks):
    epoch, o = divmod(n, num_windows)
    num_blocks = num_windows // block_windows
    if shuffle == "none":
        return o
    if shuffle == "global" or num_blocks < 2:
        return page_permute(o, num_windows, page_key(seed, epoch, "", stream))
    size = block_windows * group_blocks
    num_groups = max(1, num_windows // size)
    g = min(o // size, num_groups - 1)
    length = size if g < num_groups - 1 else num_windows - g * size
    q = g * size + page_permute(o - g * size, length, page_key(seed, epoch, f"group{g}", stream))
    slot = q // block_windows
    if slot >= num_blocks:
        return q
    return page_permute(slot, num_blocks, page_key(seed, epoch, "blocks", stream)) * block_windows + q % block_windows


def page_counts(weights, block):
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight * block / sum(exact) for weight in exact]
    counts = [share.numerator // share.denominator for share in shares]
    while sum(counts) < block:
        best = max(range(len(shares)), key=lambda i: (shares[i] - counts[i], -i))
        counts[best] += 1
    return counts


def page_stream(e, counts, seed, salt):
    if len(counts) == 1:
        return 0
    block = sum(counts)
    labels = [i for i, count in enumerate(counts) for _ in range(count)]
    return labels[page_permute(e % block, block, page_key(seed, e // block, f"mixture{salt}", ""))]


class PageStage:
    """A stage as data.json has it; streams are walked one example after the other."""

    def __init__(self, fields):
        self.fields, self.streams = fields, fields["streams"]
        self.next = [stream.get("start", 0) for stream in self.streams]  # index in each endless sequence
        self.examples = []  # (stream, window) from where the order began
        self.spares = {}  # index of the next one, by stream
        for i in range(len(self.streams)):
            self.step_over(i)

    def num_windows(self, i):
        return (self.streams[i]["num_tokens"] - 1) // self.fields["seq_len"]

    def window(self, i):
        names = ("seed", "shuffle", "block_windows", "group_blocks")
        settings = {name: self.fields[name] for name in names}
        stream = self.streams[i]["fingerprint"]
        return page_window(self.next[i], num_windows=self.num_windows(i), stream=stream, **settings)

    def step_over(self, i):
        while self.window(i) in self.streams[i]["excluded"]:
            self.next[i] += 1

    @property
    def origin(self):
        return self.fields.get("order_from", self.fields["from_position"])

    def seen(self, i):
        """The window of the next draw, or what is seen instead."""
        edit, window = self.streams[i].get("substitution"), self.window(i)
        is_of_stage = self.origin + len(self.examples) >= self.fields["from_position"]
        if not edit or not is_of_stage or window not in edit["windows"] or self.next[i] >= edit["until"]:
            return window
        left_out = {*edit["windows"], *self.streams[i]["excluded"]}
        here, self.next[i] = self.next[i], self.spares.get(i, edit["until"])
        while self.window(i) in left_out:
            self.next[i] += 1
        window, self.spares[i], self.next[i] = self.window(i), self.next[i] + 1, here
        return window

    def batch_size(self, step):
        return [size for first, size in self.fields["batch_sizes"] if first <= step][-1]

    def position(self, step):
        return self.fields["from_position"] + sum(map(self.batch_size, range(self.fields["from_step"], step)))

    def batch(self, step):
        begin = self.position(step) - self.origin
        counts = [stream["count"] for stream in self.streams]
        while len(self.examples) < begin + self.batch_size(step):
            i = page_stream(len(self.examples), counts, self.fields["seed"], self.origin or "")
            self.examples.append((i, self.seen(i)))
            self.next[i] += 1
            self.step_over(i)
        return self.examples[begin : begin + self.batch_size(step)]

    def inserted(self, step, row):
        """(document, part) that the row begins with."""
        for document in self.fields.get("inserted", []):
            for place in document["places"]:
                if place[:2] == [step, row]:
                    return document, place[2]
        return None, 0

    def num_overwritten(self, step, row):
        document, part = self.inserted(step, row)
        seq_len = self.fields["seq_len"]
        return 0 if document is None else min(seq_len + 1, document["length"] + 1 - part * seq_len)

    def counts(self, step, row):
        """1 for each target that counts."""
        stream, window = self.batch(step)[row]
        seq_len, overwritten = self.fields["seq_len"], self.num_overwritten(step, row)
        spans = self.streams[stream].get("masked", [])
        tokens = [window * seq_len + t + 1 for t in range(seq_len)]
        return [int(t + 1 < overwritten or not any(a <= token < b for a, b in spans)) for t, token in enumerate(tokens)]


def page_starts(past, wanted):
    """The starts of `wanted`'s streams after the stages `past`, each of which made all of its batches."""
    starts = []
    for new in wanted["streams"]:
        start = 0
        for stage in reversed(past):
            found = [i for i, stream in enumerate(stage.streams) if stream["fingerprint"] == new["fingerprint"]]
            if found:
                n, names = stage.next[found[0]], ["seed", "seq_len", "shuffle"]
                names += ["block_windows", "group_blocks"] if wanted["shuffle"] == "block" else []
                num_windows = (new["num_tokens"] - 1) // wanted["seq_len"]
                same = all(stage.fields[name] == wanted[name] for name in names)
                start = n if same else -(-n // stage.num_windows(found[0])) * num_windows
                break
        starts.append(start)
    return starts


def page_mark(fingerprint, start, part, counts):
    mark = xxhash.xxh3_64_intdigest(f"insert/{fingerprint}/{start}/{part}".encode()) if fingerprint else 0
    return (mark + (0 if all(counts) else xxhash.xxh3_64_intdigest(bytes(counts)))) % U64


def page_row_digest(tokens, bits, position, window, stream, mark=0):
    seed = mark + position * 0x9E3779B97F4A7C15 + window * 0xC2B2AE3D27D4EB4F + stream * 0x165667B19E3779F9
    content = b"".join(token.to_bytes(bits // 8, "little") for token in tokens)
    return seed % U64, xxhash.xxh3_64_intdigest(content, seed % U64)


# ---- The page, that implementation and the code agree ----

VECTORS = [
    (line.split(" ", 1)[0], json.loads(line.split(" ", 1)[1]))
    for line in re.search(r"```vectors\n(.*?)\n```", PAGE, re.S)[1].splitlines()
]


def vectors(kind):
    found = [fields for name, fields in VECTORS if name == kind]
    assert found
    return found


def hexadecimal(numbers):
    return [f"{int(number):016x}" for number in numbers]


def test_every_kind_of_vector_is_checked():
    kinds = {"key", "permute", "permute_one", "sequence", "counts", "mixture", "row", "ledger", "plan", "batch", "mark"}
    assert {kind for kind, _ in VECTORS} == kinds


def test_vectors_of_keys():
    for vector in vectors("key"):
        expected = vector.pop("round_keys")
        assert hexadecimal(page_key(**vector)) == expected
        assert hexadecimal(order.key(**vector)) == expected


def test_vectors_of_permutations():
    for vector in vectors("permute"):
        size, values = vector["size"], vector["values"]
        keys = page_key(vector["seed"], vector["epoch"], "", "")
        assert [page_permute(i, size, keys) for i in range(size)] == values
        assert [page_permute(v, size, keys, page_decrypt) for v in values] == list(range(size))
        round_keys = order.key(vector["seed"], vector["epoch"])
        assert order.permute(np.arange(size), size, round_keys).tolist() == values
        assert order.unpermute(values, size, round_keys).tolist() == list(range(size))
    for vector in vectors("permute_one"):
        size, round_keys = vector["size"], order.key(vector["seed"], vector["epoch"])
        assert int(order.permute(vector["index"], size, round_keys)) == vector["value"]
        assert page_permute(vector["index"], size, page_key(vector["seed"], vector["epoch"], "", "")) == vector["value"]


def test_the_example_by_hand():
    section = PAGE.split("### By hand")[1].split("\n## ")[0]
    keys, left, right = page_key(0, 0, "", ""), 0, 1
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", section, re.M)
    assert [row[0] for row in rows] == hexadecimal(keys)
    for row, k in zip(rows, keys, strict=True):
        f = page_round(right, k, 2)
        left, right = right, left ^ f
        assert [int(cell) for cell in row[1:]] == [f, left, right]
    walks = [[int(v) for v in walk.split(" -> ")] for walk in re.findall(r"^    (\d+ -> .*)$", section, re.M)]
    for i, walk in enumerate(walks):
        assert walk[0] == i and all(page_encrypt(a, 2, keys) == b for a, b in itertools.pairwise(walk))
        assert all(v >= 5 for v in walk[1:-1]) and walk[-1] < 5
    assert str([walk[-1] for walk in walks]) in section
    assert order.permute(np.arange(5), 5, order.key(0, 0)).tolist() == [walk[-1] for walk in walks]


def test_vectors_of_sequences():
    for vector in vectors("sequence"):
        indices, windows = vector.pop("indices"), vector.pop("windows")
        assert [page_window(n, **vector) for n in indices] == windows
        assert order.WindowOrder(**vector).windows_at(indices).tolist() == windows


@pytest.mark.parametrize("shuffle", order.SHUFFLES)
def test_sequences_agree_beyond_the_vectors(shuffle):
    rng = np.random.default_rng(0)
    for num_windows in (1, 4, 31, 32, 33, 77, 96, 100):
        settings = {
            "num_windows": num_windows,
            "seed": int(rng.integers(1000)),
            "stream": f"s/{num_windows}",
            "shuffle": shuffle,
            "block_windows": int(rng.integers(1, 12)),
            "group_blocks": int(rng.integers(1, 5)),
        }
        indices = rng.integers(0, 10 * num_windows, 100)
        expected = [page_window(n, **settings) for n in indices.tolist()]
        assert order.WindowOrder(**settings).windows_at(indices).tolist() == expected


def test_vectors_of_mixtures():
    for vector in vectors("counts"):
        assert page_counts(vector["weights"], vector["block"]) == vector["counts"]
        assert list(mixture.counts_of(vector["weights"], vector["block"])) == vector["counts"]
    for vector in vectors("mixture"):
        counts, seed, salt, streams = vector["counts"], vector["seed"], vector["salt"], vector["streams"]
        assert [page_stream(e, counts, seed, salt) for e in range(len(streams))] == streams
        found, _ = mixture.Mixture(tuple(counts), seed, salt).at(np.arange(len(streams)))
        assert found.tolist() == streams


def test_counts_agree_beyond_the_vectors():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.integers(10, 100, rng.integers(2, 6)) / rng.choice([1, 10, 1000])
        assert list(mixture.counts_of(weights.tolist(), 100)) == page_counts(weights.tolist(), 100)


def test_vectors_of_digests_and_of_the_ledger(tmp_path):
    for vector in vectors("row"):
        places = vector["position"], vector["window"], vector["stream"]
        seed, digest = page_row_digest(vector["tokens"], vector["bits"], *places)
        assert hexadecimal([seed, digest]) == [vector["seed"], vector["digest"]]
        tokens = np.array([vector["tokens"]], f"uint{vector['bits']}")
        position, window, stream = (np.array([place]) for place in places)
        assert hexadecimal([digest_of_rows(tokens, position, stream, window)]) == [vector["digest"]]
    for vector in vectors("ledger"):
        Ledger(int(digest, 16) for digest in vector["digests"]).write(tmp_path)
        assert (tmp_path / "ledger.bin").read_bytes().hex() == vector["file"]


def test_vectors_of_marks():
    for vector in vectors("mark"):
        places = vector["fingerprint"], vector["start"], vector["part"]
        assert hexadecimal([page_mark(*places, vector["keep"])]) == [vector["mark"]]


def test_vectors_of_plans_and_their_batches():
    fields, made, num_edited = {}, None, 0
    for kind, vector in VECTORS:
        if kind == "plan":
            fields, made = vector, plan.Plan.from_json(vector)
            assert json.loads(json.dumps(made.to_json())) == fields
        if kind != "batch":
            continue
        assert made is not None
        step = vector["step"]
        stage = PageStage([each for each in fields["segments"] if each["from_step"] <= step][-1])
        assert stage.position(step) == vector["position"]
        expected = list(zip(vector["streams"], vector["windows"], strict=True))
        assert stage.batch(step) == expected
        batch, here = made.batch(step), made.stage_at(step)
        assert list(zip(batch.streams.tolist(), batch.windows.tolist(), strict=True)) == expected
        assert batch.position == vector["position"]
        positions = batch.position + np.arange(len(batch.windows))
        keep = kept_targets_of(here, positions, batch.streams, batch.windows)
        for row in range(len(expected)):
            counts = vector.get("counts", {}).get(str(row), [1] * stage.fields["seq_len"])
            assert stage.counts(step, row) == counts == keep[row].astype(int).tolist()
        parts = [[row, part] for row, _, part in here.insertions_at(positions)]
        assert parts == vector.get("inserted", [])
        assert parts == [
            [row, part] for row in range(len(expected)) for each, part in [stage.inserted(step, row)] if each
        ]
        num_edited += bool(parts) + ("counts" in vector)
    assert num_edited == 3


class Source:
    def __init__(self, num_tokens, dtype):
        self.tokens = np.random.default_rng(num_tokens).integers(0, 50257, num_tokens).astype(dtype)
        self.num_tokens, self.dtype = num_tokens, np.dtype(dtype)

    def read(self, starts, length):
        return self.tokens[starts[:, None] + np.arange(length)]


def test_a_run_of_many_changes_agrees_in_starts_batches_and_digests():
    web, code, books = (
        stages.Stream(name, f"print of {name}", n, c)
        for name, n, c in (("web", 241, 5), ("code", 150, 3), ("books", 95, 2))
    )
    some = dataclasses.replace(web, excluded=(3, 5, 8, 40)), dataclasses.replace(code, excluded=(0, 1, 36))
    block = {"shuffle": "block", "block_windows": 4, "group_blocks": 3}
    changes = [
        (0, (dataclasses.replace(web, name="", count=1),), {"batch_sizes": ((0, 8), (2, 5))}),
        (4, (web, code), {"batch_sizes": ((0, 8), (6, 3))}),
        (9, some, {"batch_sizes": ((0, 16),)}),
        (13, (books, *some), {"batch_sizes": ((0, 16),)}),
        (17, (books, web), {"batch_sizes": ((0, 16),)} | block),
        (21, (code, web), {"batch_sizes": ((0, 16),), "seq_len": 5} | block),
        (26, (web, books, code), {"batch_sizes": ((0, 16),), "seed": 3}),
    ]
    made, past = None, []
    sources = {name: Source(n, np.uint16) for name, n in (("web", 241), ("", 241), ("code", 150))}
    sources["books"] = Source(95, np.uint32)
    for number, (first, streams, fields) in enumerate(changes):
        wanted = stages.Stage(**{"seed": 0, "seq_len": 4, "streams": streams} | fields)
        made = plan.Plan((wanted,)) if made is None else made.continued(wanted, first, fork=True)
        stage = json.loads(json.dumps(made.to_json()))["segments"][-1]
        assert [stream["start"] for stream in stage["streams"]] == page_starts(past, stage)
        past.append(PageStage(stage))
        last = changes[number + 1][0] if number + 1 < len(changes) else first + 5
        batches = Batches(sources, made, vocab_size=50257, first_index=first, num_steps=last - first)
        for step in range(first, last):
            expected, element = past[-1].batch(step), batches[step - first]
            position = past[-1].position(step)
            assert list(zip(element.streams[0].tolist(), element.windows[0].tolist(), strict=True)) == expected
            assert element.position == position
            bits = 32 if "books" in {stream["name"] for stream in stage["streams"]} else 16
            digests = [
                page_row_digest(tokens, bits, position + row, window, stream)[1]
                for row, (tokens, (stream, window)) in enumerate(zip(element.tokens[0].tolist(), expected, strict=True))
            ]
            assert element.digest == sum(digests) % U64


def test_a_run_that_is_edited_in_place_agrees_in_batches_tokens_and_digests():
    sources = {"web": Source(241, np.uint16), "code": Source(150, np.uint16), "inserted/x": Source(61, np.uint16)}
    streams = tuple(
        stages.Stream(name, f"print of {name}", sources[name].num_tokens, count, excluded=excluded)
        for name, count, excluded in (("web", 3, (5, 40, 59)), ("code", 2, ()))
    )
    settings = {"seed": 1, "seq_len": 4, "batch_sizes": ((0, 5), (3, 8)), "streams": streams}
    first = stages.Stage(**settings, shuffle="block", block_windows=4, group_blocks=3)
    document = asked_edits.InsertedDocument("inserted/x", "print of x", 61, 11, 9, 50000, ((4, 0), (5, 7), (5, 2)))
    chosen = asked_edits.Edits(
        (asked_edits.TokenSpan("print of web", 30, 75), asked_edits.TokenSpan("print of code", 60, 71)),
        (asked_edits.TokenSpan("print of web", 100, 170), asked_edits.TokenSpan("print of code", 3, 50)),
        (document,),
    )
    plain = plan.Plan((first,))
    made = edits.edited(plain, 2, asked_edits.Edits(chosen.substitute), num_steps=8)
    made = edits.edited(made, 4, chosen, num_steps=9)
    fields = json.loads(json.dumps(made.to_json()))["segments"]
    assert [each["from_step"] for each in fields] == [0, 2, 4]
    batches = Batches(sources, made, vocab_size=50257, num_steps=9)
    num_others = 0
    for step in range(9):
        page = PageStage([each for each in fields if each["from_step"] <= step][-1])
        expected, element, digest = page.batch(step), batches[step], 0
        assert list(zip(element.streams[0].tolist(), element.windows[0].tolist(), strict=True)) == expected
        num_others += sum(a != b for a, b in zip(expected, PageStage(fields[0]).batch(step), strict=True))
        for row, (stream, window) in enumerate(expected):
            tokens = sources[streams[stream].name].tokens[window * 4 : window * 4 + 5].tolist()
            each, part = page.inserted(step, row)
            if each:
                d = [*sources["inserted/x"].tokens[11:20].tolist(), 50000][part * 4 :][:5]
                assert len(d) == page.num_overwritten(step, row)
                tokens[: len(d)] = d
            assert element.tokens[0, row].tolist() == tokens
            counts = page.counts(step, row)
            assert counts == ([1] * 4 if element.keep is None else element.keep[0, row].astype(int).tolist())
            mark = page_mark(each and each["fingerprint"], each and each["start"], part, counts)
            digest += page_row_digest(tokens, 16, page.position(step) + row, window, stream, mark)[1]
        assert element.digest == digest % U64
    assert num_others > 5
