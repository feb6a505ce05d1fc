"""llm.c's model file: a header of 256 int32, then the parameters, those of one kind of all layers in a row.

https://github.com/karpathy/llm.c, `write_model` of train_gpt2.py and `ParameterTensors` of train_gpt2.c. Linear weights
are stored as (outputs, inputs), the token embedding with padded rows. Everything is little-endian.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.store.files import open_regular
from gpt_pretrain.train.weight_files.names import OF_LAYER, POSITIONS, TOKENS
from gpt_pretrain.train.weight_files.tensors import Tensor, TensorFile, placed

MAGIC = 20240326
VERSIONS = {3: "float32", 5: "bfloat16"}  # both with padded rows
HEADER_BYTES = 256 * 4
ROWS_MULTIPLE = 128  # llm.c's kernels want as many rows of the token embedding
_MOST = 1 << 31


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its model, in the header's order."""

    num_positions: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    padded_vocab_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter by GPT-2's name, in the file's order, as (inputs, outputs)."""
        width = self.n_embd
        sizes = {"c_attn": (width, 3 * width), "c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        shapes = {TOKENS: (self.padded_vocab_size, width), POSITIONS: (self.num_positions, width)}
        for name in OF_LAYER.values():
            matrix = next((size for part, size in sizes.items() if part in name), (width, width))
            shape = (width,) if ".ln_" in f".{name}" else matrix if name.endswith(".weight") else matrix[1:]
            shapes |= {f"h.{layer}.{name}": shape for layer in range(self.n_layer)}
        return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}

    def place(self, dtype: str) -> dict[str, Tensor]:
        """Where the parameters lie."""
        shapes = self.shapes
        linear = [name for name, shape in shapes.items() if len(shape) == 2 and name.startswith("h.")]
        return placed(shapes, dtype, HEADER_BYTES, transposed=frozenset(linear))

    def to_bytes(self, dtype: str) -> bytes:
        """The first 1,024 bytes of a file."""
        (version,) = (number for number, name in VERSIONS.items() if name == dtype)
        words = np.zeros(256, "<i4")
        words[:8] = MAGIC, version, *dataclasses.astuple(self)
        return words.tobytes()


def is_llmc(beginning: bytes) -> bool:
    """Whether a file that begins so says that it is one."""
    return beginning[:4] == MAGIC.to_bytes(4, "little")


def read(path: Path) -> tuple[TensorFile, Header]:
    """What lies in a file. Reads the header only. ValueError for another version, or a file that was cut short."""
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        content = file.read(HEADER_BYTES)
    if len(content) < HEADER_BYTES or not is_llmc(content):
        raise ValueError(f"{path}: not a model file of llm.c: expected a header of 256 words, the first {MAGIC}")
    words = [int(word) for word in np.frombuffer(content, "<i4")[:8]]
    if words[1] not in VERSIONS:
        raise ValueError(
            f"{path}: is llm.c's version {words[1]}, expected 3 (float32) or 5 (bfloat16). Write it again by a recent "
            "train_gpt2.py."
        )
    header = Header(*words[2:])
    values = dataclasses.astuple(header)
    too_large = header.padded_vocab_size * header.n_embd > _MOST or 12 * header.n_layer * header.n_embd**2 > _MOST << 4
    if min(values) < 1 or header.vocab_size > header.padded_vocab_size or too_large:
        raise ValueError(f"{path}: its header says {_in_words(dataclasses.asdict(header))}, which is no model")
    tensors = header.place(VERSIONS[words[1]])
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    if num_bytes != (expected := last.offset + last.num_bytes):
        raise ValueError(
            f"{path}: holds {num_bytes} bytes, expected {expected} for {_in_words(dataclasses.asdict(header))}; it was "
            "cut short or written to"
        )
    return TensorFile(path, tensors), header


def _in_words(fields: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
