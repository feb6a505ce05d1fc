"""README.md beside exported weights: what they are and what made them, as far as the run's records say."""

import contextlib
from collections.abc import Iterator

from data_prep.pages.text import markdown_code, markdown_line
from data_prep.store.files import digest_json
from data_prep.store.locations import is_remote
from data_prep.store.manifest import load
from data_prep.store.spec import Spec
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.data.run import open_run
from gpt_pretrain.data.stages import Stage, sizes_in_words
from gpt_pretrain.export.checkpoint import Checkpoint
from gpt_pretrain.model.gpt import num_params
from gpt_pretrain.train.provenance import Provenance

_HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, gpt_pretrain]\n---\n"
_LICENCES = {  # of data, by where its files come from
    "hf://datasets/HuggingFaceFW/fineweb": "ODC-By 1.0, and Common Crawl's terms of use",
    "embedded://": "public domain",
}


def model_card(checkpoint: Checkpoint, *, dtype: str, tokenizer: Tokenizer) -> str:
    """Markdown with a head for the Hub. It names no path of this machine."""
    metadata, spec = checkpoint.metadata, checkpoint.spec
    num_real = num_params(spec) - (spec.padded_vocab_size - spec.vocab_size) * spec.n_embd
    num_tokens = metadata.plan.tokens_before(metadata.step)
    sources = _sources(checkpoint)
    facts = {
        "run": markdown_code(metadata.run_id),
        "step": f"{metadata.step:,}",
        "tokens seen": f"{num_tokens:,}",
        "sequences": f"{metadata.seq_len:,} tokens in the last step; {spec.num_positions:,} positions",
        "document mask": "attention was kept within documents: use it for one at a time"
        if spec.document_mask
        else "off",
        "interventions in training": markdown_line("; ".join(each.described() for each in spec.interventions))
        + ". They are not in the weights: here the model runs without them"
        if spec.interventions
        else "none",
        "seed of the weights": str(metadata.seed),
        "digest of the plan": markdown_code(digest_json(metadata.plan.to_json())),
        "tokenizer": f"{markdown_code(tokenizer.name.rpartition('/')[2])}, digest {markdown_code(tokenizer.digest)}",
        "weights here": f"{dtype}; trained in float32, computed in {spec.dtype}",
        **_code_and_devices(checkpoint),
    }
    lines = [
        f"{_HEAD}\n# GPT-2 architecture, {num_real:,} parameters\n",
        f"{spec.n_layer} layers, {spec.n_head} heads, width {spec.n_embd}; pretrained from scratch by gpt_pretrain. In "
        "training each document began with the end-of-text token, so begin a prompt with it:\n",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        "tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)",
        'inputs = tokenizer(tokenizer.eos_token + "Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```\n",
        "## Provenance\n",
        *_table(("what", "value"), facts.items()),
        "\n## Plan of the data\n",
        *_table(_PLAN_COLUMNS, (row for stage in metadata.plan.stages for row in _plan_rows(stage, metadata.step))),
        "\nA fingerprint is a digest of a dataset's token stream, whatever its files look like.\n",
        "## Licences\n",
        "- Code that trained it: Apache-2.0.",
        *(["- Tokenizer: ranks of GPT-2, MIT, OpenAI."] if tokenizer.name == "gpt2" else []),
        *(f"- Data {markdown_code(name)}: {_data_licence(source)}." for name, source in sources.items()),
        "- Weights: no record says; who trained them decides.",
    ]
    return "\n".join(lines) + "\n"


_PLAN_COLUMNS = (
    "from step",
    "stream",
    "fingerprint",
    "tokens",
    "share",
    "excluded windows",
    "sequence",
    "batch",
    "order",
)


def _plan_rows(stage: Stage, step: int) -> Iterator[tuple[str, ...]]:
    if stage.from_step >= step:  # planned, and not seen by these weights
        return
    total = sum(stream.count for stream in stage.streams)
    for stream in stage.streams:
        yield (
            f"{stage.from_step + 1:,}",
            markdown_line(stream.name or "data"),
            markdown_code(stream.fingerprint),
            f"{stream.num_tokens:,}",
            f"{stream.count} of {total}",
            f"{len(stream.excluded):,}",
            f"{stage.seq_len:,}",
            markdown_line(sizes_in_words([*stage.batch_sizes])),
            f"{stage.shuffle}, seed {stage.seed}",
        )


def _table(columns: tuple[str, ...], rows) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _code_and_devices(checkpoint: Checkpoint) -> dict[str, str]:
    """Of the run's last start, where its record is still beside the checkpoint."""
    try:
        found = Provenance.read(checkpoint.save_dir)
    except ValueError:
        return {"code, devices": "not recorded beside the checkpoint"}
    commit = f"commit {found.code.commit}{', changed' if found.code.is_dirty else ''}" if found.code else "no checkout"
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return {
        "code": markdown_line(f"{commit}; {versions}"),
        "devices": markdown_line(f"{found.num_devices} x {found.device_kind} (last start)"),
    }


def _sources(checkpoint: Checkpoint) -> dict[str, Spec | None]:
    """What each stream's dataset was made from, by the stream's name; None where it is not there to be asked."""
    directories = {}
    with contextlib.suppress(ValueError, OSError):
        directories = open_run(checkpoint.save_dir).directories
    found = {}
    for stage in checkpoint.metadata.plan.stages:
        for stream in stage.streams:
            found[stream.name or "data"] = None
            with contextlib.suppress(ValueError, OSError, KeyError):
                manifest = load(directories[stream.fingerprint])
                if manifest.fingerprint == stream.fingerprint:
                    found[stream.name or "data"] = manifest.spec
    return found


def _data_licence(spec: Spec | None) -> str:
    """In words; what is on this machine is named by its last part only."""
    if spec is None:
        return "the dataset is not here to be asked; the terms of its sources apply"
    pieces = [piece.strip() for piece in spec.source.split(",")]
    shown = [piece if is_remote(piece) else piece.rstrip("/").rpartition("/")[2] for piece in pieces[:3]]
    named = f"made from {markdown_code(', '.join(shown))}{' and more' if len(pieces) > 3 else ''}"
    prefixes = {next((p for p in _LICENCES if entry["path"].startswith(p)), None) for entry in spec.inputs}
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        return f"{named}; {_LICENCES[prefix]}"
    return f"{named}; the terms of these sources apply"
