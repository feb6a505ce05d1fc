"""What a dataset card says, as plain data: the sections of its page."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.card.pages import (
    Block,
    Cell,
    Chart,
    Code,
    Name,
    Page,
    Paragraph,
    Sample,
    Section,
    Table,
    short,
)
from data_prep.card.samples import Excerpt
from data_prep.card.summary import (
    BATCH_ROWS,
    EXACT_BELOW,
    MAX_VALUES,
    NOTHING,
    Counts,
    Summary,
)
from data_prep.store.locations import EMBEDDED, file_name, is_remote
from data_prep.store.manifest import DOCUMENTS, INDEX, MANIFEST_NAME, Manifest
from data_prep.store.spec import FORMATS, Spec

KIND = "Prepared dataset for language model pretraining"
KIND_OF_FILE = {"bin": ".bin", "array_record": "ArrayRecord", DOCUMENTS: "table", INDEX: "index"}
MAX_INPUTS, MAX_VALUE_ROWS = 8, 15  # rows of a table
MAX_URL_CHARS = 200
BINS_PER_OCTAVE = 3
WINDOW_TOKENS = 1024  # of GPT-2
HUB_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
PLAIN_ID = re.compile(r"[<\w][\w:./<>-]{0,99}", re.ASCII)
ISO_LANGUAGE = re.compile("[a-z]{2,3}")
MAX_HUB_LANGUAGES = 20


def make_page(manifest: Manifest, summaries: Mapping[str, Summary], excerpts: Iterable[Excerpt]) -> Page:
    """All that a card says."""
    excerpts = list(excerpts)
    samples = tuple(map(_sample, excerpts))
    spec = manifest.spec
    total = sum(summaries.values(), NOTHING)
    tiles = (
        ("Tokens", short(total.num_tokens), f"{total.num_tokens:,}"),
        ("Documents", short(total.num_documents), f"{total.num_documents:,}"),
        ("Median document", f"{total.quantile(50):,}", f"tokens, of at most {total.max_tokens:,}"),
        ("Bytes per token", bytes_per_token(total), f"of text: {text_size(total)}"),
        ("Vocabulary", f"{spec.vocab_size:,}", f"ids of {shown_path(spec.tokenizer)}"),
    )
    columns = ("domain", "url", total.domains), ("dump", "dump", total.dumps)
    columns += (("language", "language", total.languages),)
    sections = (
        Section("Stream", _stream_blocks(manifest, summaries)),
        Section("Samples", samples or (_paragraph("No documents."),)),
        Section("Length of documents", _length_blocks(summaries, total)),
        *(
            Section(f"{kind.capitalize()}s", _count_blocks(kind, column, counts, total))
            for kind, column, counts in columns
        ),
        Section("Sources", _source_blocks(spec)),
        Section("Files", _file_blocks(manifest)),
        Section("What to type next", _command_blocks(manifest, excerpts)),
    )
    return Page(_title(spec.source), KIND, tiles, sections, _hub_metadata(manifest, total))


def _paragraph(*parts: str | Name) -> Paragraph:
    return Paragraph(parts)


def _sample(excerpt: Excerpt) -> Sample:
    row = excerpt.row
    facts = {
        "place": f"{excerpt.split} from token {row['start']:,} on",
        "length": f"{row['length']:,} tokens",
        "id": row["id"],
        "url": row["url"] and row["url"][:MAX_URL_CHARS],
        "dump": row["dump"],
        "language": row["language"],
        "source": f"{shown_path(row['source_file'] or '')}, row {row['row']}",
    }
    known = tuple((name, fact) for name, fact in facts.items() if fact not in (None, ""))
    return Sample(excerpt.text, excerpt.is_whole, known)


def _stream_blocks(manifest: Manifest, summaries: Mapping[str, Summary]) -> tuple[Block, ...]:
    spec = manifest.spec
    rows = tuple(
        (
            name,
            split.num_documents,
            split.num_tokens,
            text_size(summaries[name]),
            bytes_per_token(summaries[name]),
            f"{split.unigram_entropy:.3f}",
        )
        for name, split in manifest.splits.items()
    )
    header = ("Split", "Documents", "Tokens", "Text", "Bytes per token", "Unigram entropy")
    cut = (("cut at", f"{spec.max_tokens:,} tokens"),) if spec.max_tokens else ()
    identity: tuple[tuple[Cell, ...], ...] = (
        ("fingerprint", Name(manifest.fingerprint)),
        ("tokenizer", Name(shown_path(spec.tokenizer))),
        ("tokenizer's digest", Name(spec.tokenizer_digest)),
        *cut,
    )
    return (
        _paragraph(
            "One stream of tokens a split: for each document, in the order of the input, the "
            f"end-of-text token ({spec.end_of_text:,}) and then the tokens of its text."
        ),
        Table("Splits", header, rows),
        _paragraph(
            "Bytes per token are UTF-8 bytes of text over all tokens of the stream, end-of-text "
            "included. The entropy, in nats a token, is the loss of a model that knows only how "
            "often each token occurs."
        ),
        Table("Identity", ("", ""), identity, num_text_columns=2),
    )


def _length_blocks(summaries: Mapping[str, Summary], total: Summary) -> tuple[Block, ...]:
    if not total.num_documents:
        return (_paragraph("No documents."),)
    named = dict(summaries) | ({"all": total} if len(summaries) > 1 else {})
    quantiles = {name: [one.quantile(p) for p in (50, 90, 99)] for name, one in named.items()}
    rows = tuple(
        (
            name,
            *quantiles[name],
            one.max_tokens,
            f"{one.num_tokens / max(1, one.num_documents):,.1f}",
        )
        for name, one in named.items()
    )
    chart = Chart(
        bins=tuple(total.histogram(BINS_PER_OCTAVE)),
        octaves=tuple(total.histogram(1)),
        median=total.quantile(50),
        token_median=total.token_quantile(50),
    )
    short_documents = int(total.documents_B[: WINDOW_TOKENS + 1].sum())
    short_tokens = int(total.tokens_B[: WINDOW_TOKENS + 1].sum())
    rounded = max(chart.token_median, *(max(values) for values in quantiles.values()))
    note = _paragraph(f"Quantiles from {EXACT_BELOW:,} tokens on are rounded down, by less than 0.1 %.")
    return (
        _paragraph(
            "In tokens, end-of-text included. "
            f"{percent(short_documents, total.num_documents)} of the documents, with "
            f"{percent(short_tokens, total.num_tokens)} of the tokens, are no longer than "
            f"GPT-2's window of {WINDOW_TOKENS:,} tokens."
        ),
        chart,
        Table("Quantiles", ("Split", "Median", "90 %", "99 %", "Longest", "Mean"), rows),
        *((note,) if rounded >= EXACT_BELOW else ()),
    )


def _count_blocks(kind: str, column: str, counts: Counts, total: Summary) -> tuple[Block, ...]:
    """The most frequent values of a column, and what is left."""
    if not counts.of_value:
        return (_paragraph(f"The documents tables name no {column}."),)
    top = counts.top(MAX_VALUE_ROWS)
    rest_documents = total.num_documents - counts.of_none[0] - sum(row[1] for row in top)
    rest_tokens = total.num_tokens - counts.of_none[1] - sum(row[2] for row in top)
    rows = [(value, documents, tokens) for value, documents, tokens in top]
    if rest_documents:
        rows.append((f"all other {kind}s", rest_documents, rest_tokens))
    if counts.of_none[0]:
        rows.append((f"no {column}", *counts.of_none))
    shown = tuple(
        (
            Name(name) if index < len(top) else name,
            documents,
            percent(documents, total.num_documents),
            tokens,
            percent(tokens, total.num_tokens),
        )
        for index, (name, documents, tokens) in enumerate(rows)
    )
    bars = tuple(row[1] / top[0][1] if index < len(top) else 0.0 for index, row in enumerate(rows))
    if counts.slack:
        caption = f"The {len(top)} most frequent {kind}s"
        note = (
            f"Counted are the {MAX_VALUES:,} most frequent {kind}s of each documents table (of "
            f"each {BATCH_ROWS:,} rows of a larger one): a {kind} may have up to "
            f"{counts.slack:,} documents more than shown here."
        )
    else:
        caption = plural(len(counts.of_value), kind)
        if rest_documents:
            caption = f"The {len(top)} most frequent of {caption}"
        note = ""
    header = (kind.capitalize(), "Documents", "Share", "Tokens", "Share")
    table = Table(caption, header, shown, bars=bars)
    return (table, _paragraph(note)) if note else (table,)


def _source_blocks(spec: Spec) -> tuple[Block, ...]:
    inputs = spec.inputs
    shown, others = inputs[:MAX_INPUTS], inputs[MAX_INPUTS:]
    rows = [(Name(shown_path(entry["path"])), _total_size([entry])) for entry in shown]
    if others:
        rows += [(f"{len(others):,} more", _total_size(others)), ("all", _total_size(inputs))]
    pieces = [shown_path(piece.strip()) for piece in spec.source.split(",")]
    more = f" and {len(pieces) - MAX_INPUTS:,} more" if len(pieces) > MAX_INPUTS else ""
    column = spec.text_column  # None where the stream was not made from text
    what = (", texts in the column ", Name(column)) if column else (" of tokens",)
    return (
        _paragraph(
            "Asked for as ",
            Name(", ".join(pieces[:MAX_INPUTS])),
            f"{more}: {plural(len(inputs), 'input file')}",
            *what,
            ". This card claims no licence: the terms of the sources apply.",
        ),
        Table(
            f"Input files{f', the first {len(shown)}' if others else ''}",
            ("File", "Size"),
            tuple(rows),
        ),
    )


def _total_size(inputs: Sequence[Mapping[str, Any]]) -> str:
    sizes = [entry["size"] for entry in inputs]
    return "unknown" if None in sizes else size_text(sum(sizes))


def _file_blocks(manifest: Manifest) -> tuple[Block, ...]:
    rows: list[tuple[Cell, ...]] = []
    for split in manifest.splits:
        for format in (*manifest.spec.formats, DOCUMENTS, INDEX):
            shards = manifest.shards_of(split, format)
            if shards:
                size = size_text(sum(shard.num_bytes for shard in shards))
                name = shards[0].name + (" …" if len(shards) > 1 else "")
                kind = KIND_OF_FILE[format]
                rows.append((Name(name), kind, split, len(shards), size))
    total = size_text(sum(shard.num_bytes for shard in manifest.shards))
    rows.append(("all", "", "", len(manifest.shards), total))
    tables = Name(f"{DOCUMENTS}_*.parquet")
    same = "Both formats hold the same stream. " if len(manifest.spec.formats) > 1 else ""
    return (
        Table(
            "Number and size by split and format",
            ("Name", "Format", "Split", "Files", "Size"),
            tuple(rows),
            3,
        ),
        _paragraph(
            Name(MANIFEST_NAME),
            f" has the size and the digest of each of them. {same}The tables ",
            tables,
            " say where in the stream each document starts and where it came from.",
        ),
    )


def _command_blocks(manifest: Manifest, excerpts: Sequence[Excerpt]) -> tuple[Block, ...]:
    spec = manifest.spec
    config = "quickstart" if spec.source == "sample" else "gpt2_124m"
    lines = [
        "DATA=path/to/this/directory",
        "",
        "# train on it",
        f'python -m gpt_pretrain.main --gin_file=configs/{config}.gin --data_dir="$DATA"',
        "",
        "# verify every file",
        'python -m data_prep.check "$DATA"',
    ]
    for format in FORMATS:
        if format not in spec.formats:
            command = f'python -m data_prep.convert "$DATA" --to={format}'
            lines += ["", "# add the other format", command]
    if excerpts:
        split, row = excerpts[0].split, excerpts[0].row
        command = 'python -m data_prep.documents "$DATA"'
        lines += ["", "# which document holds a token of the stream, and its text"]
        lines.append(f"{command} --split={split} --token={row['start']} --text")
        # Nothing that a shell, or who reads the command, could take for something else.
        if PLAIN_ID.fullmatch(row["id"] or ""):
            lines += ["", "# where a document is", f"{command} --id {shlex.quote(row['id'])}"]
    return (Code("sh", "\n".join(lines)),)


def _hub_metadata(manifest: Manifest, total: Summary) -> dict[str, object]:
    """Front matter of a Hugging Face dataset card, as far as it can be known."""
    exponent = max(3, len(str(total.num_documents)))  # 1,000 has 4 digits: 1K<n<10K
    place = min(exponent - 3, len(HUB_SIZES))
    low, high = (["", *HUB_SIZES][place], [*HUB_SIZES, ""][place])
    size = f"n<{high}" if not low else f"{low}<n<{high}" if high else f"n>{low}"
    names = [name for name, *_ in total.languages.top(MAX_HUB_LANGUAGES)]
    languages = [name for name in names if ISO_LANGUAGE.fullmatch(name)]
    files = [{"split": split, "path": f"{DOCUMENTS}_{split}_*.parquet"} for split in manifest.splits]
    return {
        "pretty_name": _title(manifest.spec.source),
        **({"language": languages} if languages else {}),
        "size_categories": [size],
        "task_categories": ["text-generation"],
        "configs": [{"config_name": DOCUMENTS, "data_files": files}],
    }


def _title(source: str) -> str:
    """A name for the dataset: a preset's, or that of its only file."""
    is_one = not re.search(r"[,*?\[]", source)
    return file_name(source) if is_one and file_name(source) else "Prepared text"


def shown_path(path: str) -> str:
    """A path without what concerns only one machine or one user.

    /home/me/a.jsonl -> a.jsonl; https://me:secret@host/a.jsonl?key=1 -> https://host/a.jsonl
    """
    if path.startswith(EMBEDDED):
        return path
    if is_remote(path):
        scheme, _, rest = re.split(r"[?#]", path)[0].partition("://")
        host, slash, inner = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{inner}"
    is_here = not path.startswith(("/", "~", "..", "file://"))
    return path if is_here else os.path.basename(path)


def bytes_per_token(summary: Summary) -> str:
    """UTF-8 bytes of text over tokens of the stream, in words where it is not known."""
    if not summary.num_text_bytes:
        return "unknown"
    return f"{summary.num_text_bytes / summary.num_tokens:.3f}"


def text_size(summary: Summary) -> str:
    """Size of the texts, in words where it is not known."""
    return size_text(summary.num_text_bytes) if summary.num_text_bytes else "unknown"


def size_text(num_bytes: int) -> str:
    """1500000 -> 1.5 MB"""
    return f"{short(num_bytes, 'KMGT')}B" if num_bytes >= 1000 else f"{num_bytes} bytes"


def percent(part: int, whole: int) -> str:
    """1, 8 -> 12.5 %"""
    return f"{100 * part / max(1, whole):.1f} %"


def plural(number: int, noun: str) -> str:
    """1, "file" -> 1 file; 2 -> 2 files"""
    return f"{number:,} {noun}{'s' * (number != 1)}"
