"""data_prep.card: its numbers are those of the tables, and no text of a corpus becomes markup."""

import dataclasses
import html.parser
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt

from data_prep import card, documents
from data_prep.card import __main__ as card_main
from data_prep.card import summary as card_summary
from data_prep.card.samples import read_excerpts
from data_prep.card.summary import NOTHING, SummaryJob, summarize, summarize_splits
from data_prep.card.words import shown_path
from data_prep.engines.local import Workers
from data_prep.store.documents import DOCUMENT_COLUMNS
from data_prep.store.files import digest_of
from data_prep.store.manifest import FORMAT_VERSION, Manifest, Shard, Split, load, save
from data_prep.store.spec import Spec
from data_prep.store.token_bin import write_tokens
from data_prep.store.token_records import write_records
from data_prep.store.tokenizers import user_tokenizer

HOSTILE = "</blockquote><script>alert(1)</script>\n````\n# <b onclick='x'>b</b> [a](javascript:x) | \x00\u202e"
DOCUMENTS = [  # text, url, dump, language
    ("one", "https://www.a.org/1", "D1", "en"),
    ("four", "http://A.org:80/2?x=//www.b.org", "D1", "en"),
    ("-", None, None, None),
    ("äöü", "https://b.org/", "D2", "de"),
    ("x" * 3000, "no address", "D1", None),
    (HOSTILE, f"https://b.org/{HOSTILE}", HOSTILE, HOSTILE),
]


def look(path: Path) -> tuple[int, str]:
    """Size and digest of a file."""
    return path.stat().st_size, digest_of(path)


def make_dataset(directory: Path, documents, formats=("bin",), shard_documents=2) -> Path:
    """A dataset as data_prep.fineweb leaves it, with the first document as validation split."""
    directory.mkdir()
    tokenizer = user_tokenizer("byte")
    splits, shards = {}, []
    for split, part in (("train", documents[1:]), ("val", documents[:1])):
        streams = [
            np.concatenate([[tokenizer.end_of_text], tokenizer.encode(text)]).astype(np.uint16) for text, *_ in part
        ]
        lengths = [len(stream) for stream in streams]
        starts = np.cumsum([0, *lengths])
        fields = ("id", "url", "dump", "language", "source_file")
        table = pa.table(
            {
                "start": pa.array(starts[:-1], pa.int64()),
                "length": pa.array(lengths, pa.int64()),
                "text_bytes": pa.array([len(text.encode()) for text, *_ in part], pa.int64()),
                **{name: pa.array([None] * len(part), pa.string()) for name in fields},
                "row": pa.array(range(len(part)), pa.int64()),
            }
        )
        columns = [
            [f"{HOSTILE}{i}" for i in range(len(part))],
            *zip(*(d[1:] for d in part), strict=True),
        ]
        columns.append([f"/home/me/{HOSTILE}.jsonl"] * len(part))
        for name, values in zip(fields, columns, strict=True):
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        assert set(DOCUMENT_COLUMNS.names) <= set(table.column_names)
        # Documents cross the shards of tokens, whose cuts are elsewhere.
        stream, cut = np.concatenate(streams), int(starts[-1]) // 16 * 8
        for index, (start, stop) in enumerate([(0, cut), (cut, len(stream))]):
            for format, write, options in (
                ("bin", write_tokens, {}),
                ("array_record", write_records, {"record_tokens": 8}),
            ):
                if format in formats and start < stop:
                    path = directory / f"fineweb_{split}_{index:06d}.{format}"
                    write(path, [stream[start:stop]], stop - start, **options)
                    shards.append(Shard(path.name, format, split, stop - start, stop - start, *look(path)))
        for index in range(0, len(part), shard_documents):
            path = directory / f"documents_{split}_{index:06d}.parquet"
            rows = table.slice(index, shard_documents)
            pq.write_table(rows, path, row_group_size=1)
            num_tokens = sum(rows["length"].to_pylist())
            shards.append(Shard(path.name, "documents", split, num_tokens, len(rows), *look(path)))
        splits[split] = Split(len(stream), len(part), "0", 1.5)
    spec = Spec(
        source="/home/me/texts/*.jsonl",
        inputs=tuple({"path": f"/home/me/{HOSTILE}/a{i}.jsonl", "size": 1000 + i} for i in range(12)),
        tokenizer="byte",
        tokenizer_digest=tokenizer.digest,
        vocab_size=257,
        end_of_text=256,
        text_column="text",
        formats=formats,
        bin_header="short",
        shard_tokens=100_000_000,
        record_tokens=8,
        record_compression="none",
        val_tokens=0,
    )
    save(
        Manifest(FORMAT_VERSION, "fineweb", spec, splits, tuple(shards), fingerprint="0"),
        directory,
    )
    return directory


class Tags(html.parser.HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def dataset(tmp_path) -> Path:
    return make_dataset(tmp_path / "dataset", DOCUMENTS)


def test_numbers_are_those_of_the_tables_and_nulls_are_counted_apart(dataset):
    summaries = summarize_splits(dataset, load(dataset))
    train, total = summaries["train"], sum(summaries.values(), NOTHING)
    lengths = [1 + len(text.encode()) for text, *_ in DOCUMENTS]
    assert (train.num_documents, train.num_tokens) == (5, sum(lengths[1:]))
    assert (total.num_tokens, total.max_tokens) == (sum(lengths), 3001)
    assert total.num_text_bytes == sum(lengths) - 6
    hostile = lengths[-1]
    assert total.domains.top() == [("a.org", (2, 4 + 5)), ("b.org", (2, 7 + hostile))]
    assert total.domains.of_none == (2, 2 + 3001)
    assert total.dumps.top() == [("D1", (3, 4 + 5 + 3001)), (HOSTILE, (1, hostile)), ("D2", (1, 7))]
    assert total.languages.of_none == (2, 2 + 3001)
    card.write_card(dataset)
    readme = (dataset / "README.md").read_text()
    assert f"| `a.org` | 2 | 33.3 % | 9 | {100 * 9 / sum(lengths):.1f} % |" in readme
    num_bytes, num_tokens = sum(lengths[1:]) - 5, sum(lengths[1:])
    row = f"| train | 5 | {num_tokens:,} | {num_bytes / 1000:.3g} KB | {num_bytes / num_tokens:.3f} | 1.500 |"
    assert row in readme
    assert "| no url | 2 | 33.3 % | 3,003 |" in readme


def test_quantiles_are_exact_below_2048_tokens_and_within_a_thousandth_above(tmp_path):
    lengths = np.exp(np.random.default_rng(0).normal(7, 2, 20_000)).astype(np.int64) + 1
    parts = []
    for index, part in enumerate(np.array_split(lengths, 3)):
        path = tmp_path / f"{index}.parquet"
        words = pa.nulls(len(part), pa.string())
        columns = {
            "length": part,
            "text_bytes": part,
            "url": words,
            "dump": words,
            "language": words,
        }
        pq.write_table(pa.table(columns), path)
        parts.append(summarize(SummaryJob(str(path), *look(path)), lambda *counts: None))
    summary = sum(parts, NOTHING)
    for percent in (0, 1, 25, 50, 75, 90, 99, 100):
        expected = np.quantile(lengths, percent / 100, method="inverted_cdf")
        found = summary.quantile(percent)
        assert found == expected if expected < 2048 else 0 <= expected - found < 0.001 * expected
    bins = summary.histogram(3)
    assert sum(one.num_tokens for one in bins) == lengths.sum()
    below = sum(one.num_documents for one in bins if one.stop <= 1024)
    assert below == (lengths < 1024).sum()


class BackwardWorkers(Workers):
    """Workers of which the one with the last job is the first to be done."""

    def run(self, *args):
        yield from reversed(list(super().run(*args)))


@pytest.mark.parametrize(
    "limits, tables, counted, slack",
    [
        # b is the second of two tables that keep one value, hence missed twice.
        ((1, 100), ["aab", "ccb", "bbb"], 3, 2),
        # Sums keep one value as soon as there are more than two: b's first two documents go.
        ((100, 1), ["abaab", "c", "bbbbb"], 5, 2),
    ],
)
def test_a_long_tail_gives_lower_bounds_and_the_card_says_how_low(
    tmp_path, monkeypatch, limits, tables, counted, slack
):
    monkeypatch.setattr(card_summary, "Workers", BackwardWorkers)  # must make no difference
    monkeypatch.setattr(card_summary, "MAX_VALUES", limits[0])
    monkeypatch.setattr(card_summary, "MAX_MERGED", limits[1])
    texts = [f"//{host}/" if host != " " else None for table in tables for host in f"{table:5}"]
    documents = [("val", None, None, None), *(("text", url, None, None) for url in texts)]
    dataset = make_dataset(tmp_path / "dataset", documents, shard_documents=5)
    domains = summarize_splits(dataset, load(dataset))["train"].domains
    assert domains.of_value["b"][0] == counted == "".join(tables).count("b") - slack
    assert domains.slack == slack
    card.write_card(dataset)
    assert f"may have up to {slack} documents more" in (dataset / "README.md").read_text()


def test_hostile_text_is_shown_and_not_obeyed(dataset):
    card.write_card(dataset)
    page = Tags((dataset / "card.html").read_text())
    assert not {"script", "a", "img", "iframe", "link"} & set(page.tags)
    assert page.tags.count("blockquote") == page.tags.count("article") == 5
    assert not any(name.startswith("on") or "javascript" in value for name, value in page.attributes)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\u202e", "\ufffd")
    assert any(text.startswith(shown) for text in page.texts)

    readme = (dataset / "README.md").read_text().split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(readme)
    inline = [token for one in tokens for token in (one.children or ())]
    assert not {token.type for token in (*tokens, *inline)} & {"html_block", "html_inline", "image"}
    assert [t.attrs["href"] for t in inline if t.type == "link_open"] == ["card.html"]
    headings = [two.content for one, two in itertools.pairwise(tokens) if one.type == "heading_open"]
    assert (headings[0], headings[1], headings[-1]) == (
        "Prepared text",
        "Stream",
        "What to type next",
    )
    assert len(headings) == page.tags.count("h1") + page.tags.count("h2") == 10
    assert any(t.type == "fence" and t.content.startswith(shown) for t in tokens)
    # A bar in a cell would push the rest of its row aside, a line feed would end the table.
    cells = [token.content for token in tokens if token.type == "inline"]
    place = cells.index("`D2`")
    assert cells[place - 5].startswith("&lt;/blockquote&gt;")
    assert cells[place - 4 : place - 2] == ["1", "16.7 %"]


def test_the_page_needs_nothing_but_itself(dataset):
    card.write_card(dataset)
    text = (dataset / "card.html").read_text()
    page = Tags(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    style = re.search("<style>(.*?)</style>", text, re.S).group(1)
    styles = [style, *(value for name, value in page.attributes if name == "style")]
    assert not any(word in one for word in ("url(", "@import") for one in styles)


def test_equal_datasets_have_equal_cards_whatever_their_place_and_the_workers(tmp_path):
    cards = []
    for name, num_workers in (("here", 1), ("there", 2)):
        dataset = make_dataset(tmp_path / name, DOCUMENTS)
        before = {path.name for path in dataset.iterdir()}
        card.write_card(dataset, num_workers)
        cards.append([(dataset / new).read_bytes() for new in ("README.md", "card.html")])
        assert {path.name for path in dataset.iterdir()} - before == {"README.md", "card.html"}
        card.write_card(dataset)
        assert cards[-1] == [(dataset / new).read_bytes() for new in ("README.md", "card.html")]
    assert cards[0] == cards[1]
    assert not any(place in text for text in cards[0] for place in (b"/home/me", bytes(tmp_path)))


def test_samples_are_the_same_from_either_format(tmp_path):
    samples = []
    for format in ("bin", "array_record"):
        dataset = make_dataset(tmp_path / format, DOCUMENTS, formats=(format,))
        samples.append([(one.text, one.is_whole) for one in read_excerpts(dataset, load(dataset))])
    first = [("four", True), ("-", True), ("x" * 400, False), (HOSTILE, True), ("one", True)]
    assert samples == [first, first]


def test_front_matter_is_yaml_and_claims_no_licence(dataset):
    manifest = load(dataset)
    spec = dataclasses.replace(manifest.spec, source="texts/a: 'b' #c.jsonl")
    save(dataclasses.replace(manifest, spec=spec), dataset)
    card.write_card(dataset)
    readme = (dataset / "README.md").read_text()
    matter = yaml.safe_load(readme.split("---\n")[1])
    assert matter["size_categories"] == ["n<1K"] and matter["language"] == ["en", "de"]
    assert matter["pretty_name"] == "a: 'b' #c.jsonl"
    assert "license" not in matter


def test_the_look_up_in_the_card_finds_the_sample(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "dataset", DOCUMENTS)
    card.write_card(dataset)
    readme = (dataset / "README.md").read_text()
    (command,) = re.findall(r"python -m data_prep.documents (.*--token.*)", readme)
    assert "--id" not in readme  # hostile: nobody should paste it into a shell
    arguments = [arg.replace("$DATA", str(dataset)) for arg in shlex.split(command)]
    assert documents.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "four"


@pytest.mark.parametrize(
    "path, shown",
    [
        ("/home/me/a.jsonl", "a.jsonl"),
        ("texts/a.jsonl", "texts/a.jsonl"),
        ("embedded://sample.parquet", "embedded://sample.parquet"),
        ("https://me:secret@host/a/b.jsonl?key=1", "https://host/a/b.jsonl"),
    ],
)
def test_paths_are_shown_without_home_and_secrets(path, shown):
    assert shown_path(path) == shown


def test_it_refuses_a_damaged_dataset_and_a_readme_of_someone_else(dataset, capsys):
    (dataset / "README.md").write_text("# Mine\n")
    assert card_main.main([str(dataset)]) == 1
    assert "README.md: is not a card" in capsys.readouterr().err
    assert (dataset / "README.md").read_text() == "# Mine\n"
    (dataset / "README.md").unlink()
    path = dataset / "documents_train_000002.parquet"
    content = path.read_bytes()
    pq.write_table(pq.read_table(path).slice(1), path)
    assert card_main.main([str(dataset)]) == 1
    assert f"{path}: holds {path.stat().st_size} bytes, expected" in capsys.readouterr().err
    path.write_bytes(content[:-1] + b"?")
    assert card_main.main([str(dataset)]) == 1
    assert f"{path}: digest is" in capsys.readouterr().err
    path.unlink()
    assert card_main.main([str(dataset)]) == 1
    assert f"{path}: missing" in capsys.readouterr().err
