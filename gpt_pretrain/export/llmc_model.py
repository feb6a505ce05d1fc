"""A checkpoint as llm.c's model file."""

from pathlib import Path

from data_prep.store.files import whole_file
from gpt_pretrain.export.checkpoint import Checkpoint, check_target
from gpt_pretrain.train.weight_files import tensors
from gpt_pretrain.train.weight_files.llmc_file import ROWS_MULTIPLE, Header


def write_model(checkpoint: Checkpoint, out: Path, *, dtype: str) -> None:
    """Writes all rows of the token embedding, and zeros up to the next multiple that llm.c wants."""
    spec = checkpoint.spec
    header = Header(
        num_positions=spec.num_positions,
        vocab_size=spec.vocab_size,
        n_layer=spec.n_layer,
        n_head=spec.n_head,
        n_embd=spec.n_embd,
        padded_vocab_size=-(-spec.padded_vocab_size // ROWS_MULTIPLE) * ROWS_MULTIPLE,
    )
    placed, beginning = header.place(dtype), header.to_bytes(dtype)
    check_target(out, len(beginning) + sum(each.num_bytes for each in placed.values()))
    with whole_file(out) as partial:
        tensors.write(partial, beginning, placed, checkpoint.arrays())
