"""The .safetensors format: 8 bytes with the length of a JSON header, the header, the tensors.

https://github.com/huggingface/safetensors. Written here and not by its library, which wants all tensors in memory at
once.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.store.files import open_regular
from gpt_pretrain.train.weight_files.names import plain_name
from gpt_pretrain.train.weight_files.tensors import DTYPES, Tensor, TensorFile, placed
from gpt_pretrain.train.weight_files.tensors import write as write_tensors

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PREFIX = "transformer."  # of the names that transformers writes


def make_header(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: Mapping[str, str], prefix: str = _PREFIX
) -> tuple[bytes, dict[str, Tensor]]:
    """The beginning of a file, and where its tensors lie, by GPT-2's names; in the file they begin with `prefix`."""
    names = {name: short for short, name in _DTYPES.items()}
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}  # transformers asks for the format
    for name, tensor in placed(shapes, dtype, 0).items():
        end = tensor.offset + tensor.num_bytes
        offsets = [tensor.offset, end]
        fields[prefix + name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, placed(shapes, dtype, 8 + len(text))


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A file with arrays that are no weights, in float32, under the names that they have here."""
    header, tensors = make_header({name: each.shape for name, each in arrays.items()}, "float32", metadata, prefix="")
    write_tensors(path, header, tensors, arrays.items())


def read(path: Path) -> tuple[TensorFile, dict[str, str]]:
    """What lies in a file, and its metadata. Reads the header only.

    Raises ValueError for what is no such file, or was cut short.
    """
    fields, start, num_bytes = _read_header(path)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: not a .safetensors file: its metadata is {metadata!r:.80}")
    tensors = {}
    for full_name, entry in fields.items():
        if (name := plain_name(full_name)) is None:
            continue
        if name in tensors:
            raise ValueError(f"{path}: has {name} twice, with and without {_PREFIX!r}")
        tensors[name] = _tensor(f"{path}: {full_name}", entry, start, num_bytes)
    return TensorFile(path, tensors), {str(key): str(value) for key, value in metadata.items()}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the offset of the data, and the size of the file."""
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or length > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(
                f"{path}: not a .safetensors file, or cut short: holds {num_bytes} bytes, and a header of {length} is "
                "expected"
            )
        content = b""
        while len(content) < length and (piece := file.read(length - len(content))):
            content += piece
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a .safetensors file: its header is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: not a .safetensors file: its header is no object")
    return fields, 8 + length, num_bytes


def _tensor(where: str, entry: Any, start: int, num_bytes: int) -> Tensor:
    """One entry of the header, checked against the file's size."""
    try:
        dtype, shape, (first, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(each) is int and each >= 0 for each in (*shape, first, end)):
            raise ValueError("expected counts")
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: found {entry!r:.200}, expected dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{where}: is of dtype {dtype!r:.20}, expected one of {', '.join(_DTYPES)}")
    expected = math.prod(shape) * DTYPES[_DTYPES[dtype]].itemsize
    if end - first != expected or start + end > num_bytes:
        raise ValueError(
            f"{where}: lies in bytes {first} to {end} of {num_bytes - start}, expected {expected} bytes in the file; "
            "it was cut short or written to"
        )
    return Tensor(start + first, shape, _DTYPES[dtype])
