"""A checkpoint as a folder that transformers opens: `AutoModelForCausalLM.from_pretrained(FOLDER)`."""

from pathlib import Path
from typing import Any

from data_prep.store.files import write_json
from data_prep.store.local_files import whole_directory
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.export.checkpoint import Checkpoint, check_target
from gpt_pretrain.export.model_card import model_card
from gpt_pretrain.train.weight_files import safetensors_file, tensors
from gpt_pretrain.train.weight_files.names import TOKENS, shapes_of
from gpt_pretrain.train.weight_files.transformers_config import config_of


def write_folder(checkpoint: Checkpoint, out: Path, *, dtype: str, tokenizer: Tokenizer) -> None:
    """Writes weights without the padded rows of the vocabulary, configuration, tokenizer and model card.

    Args:
      dtype: of the weights, "float32" or "bfloat16".

    Raises ValueError for a tokenizer that has no tokenizer.json, or other ids than the model.
    """
    spec, metadata = checkpoint.spec, checkpoint.metadata
    found, expected = (tokenizer.vocab_size, tokenizer.end_of_text), (spec.vocab_size, spec.end_of_text)
    if found != expected:
        raise ValueError(
            f"tokenizer {tokenizer.name}: has {found[0]} ids and ends texts by {found[1]}, the model was trained on "
            f"{expected[0]} and {expected[1]}. Name the one that made the data: --tokenizer=..."
        )
    tokenizer_files = _tokenizer_files(tokenizer, spec.num_positions)
    shapes = shapes_of(spec) | {TOKENS: (spec.vocab_size, spec.n_embd)}
    facts = {"tokenizer_digest": tokenizer.digest, "run_id": metadata.run_id, "step": str(metadata.step)}
    header, placed = safetensors_file.make_header(shapes, dtype, facts)
    check_target(out, len(header) + sum(each.num_bytes for each in placed.values()))
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), spec.end_of_text)
    with whole_directory(out) as partial:
        tensors.write(partial / "model.safetensors", header, placed, checkpoint.arrays())
        write_json(partial / "config.json", config_of(spec, dtype))
        write_json(partial / "generation_config.json", ends)
        for name, fields in tokenizer_files.items():
            write_json(partial / name, fields)
        card = model_card(checkpoint, dtype=dtype, tokenizer=tokenizer)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_files(tokenizer: Tokenizer, num_positions: int) -> dict[str, dict[str, Any]]:
    to_json = getattr(tokenizer, "to_tokenizer_json", None)
    if to_json is None:
        raise ValueError(
            f"tokenizer {tokenizer.name}: cannot be written as tokenizer.json, as it is a class of your own. Give it a "
            "method to_tokenizer_json() that returns the fields of one."
        )
    fields = to_json()
    end = next(token["content"] for token in fields["added_tokens"] if token["id"] == tokenizer.end_of_text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what is in tokenizer.json, and nothing built from its name
        "model_max_length": num_positions,
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": fields, "tokenizer_config.json": config}
