"""Tensors that lie in a file: each is read, and written, where it lies, without the others."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

DTYPES = {name: np.dtype(kind) for name, kind in (("float32", "<f4"), ("bfloat16", jnp.bfloat16), ("float16", "<f2"))}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one lies, and how.

    Attributes:
      offset: of its first byte in the file.
      shape: as it is read.
      dtype: a name of `DTYPES`.
      is_transposed: a matrix that is stored with its axes the other way round.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    is_transposed: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A file and what lies in it, by GPT-2's names."""

    path: Path
    tensors: Mapping[str, Tensor]

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """A part of a tensor, in float32: exactly the file's values. Only these bytes are read."""
        tensor = self.tensors[name]
        stored_shape = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
        stored = np.memmap(self.path, DTYPES[tensor.dtype], "r", tensor.offset, stored_shape)
        return np.array((stored.T if tensor.is_transposed else stored)[index], np.float32)


def placed(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, offset: int, transposed: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Tensors one after the other from `offset` on, in the order of `shapes`."""
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = Tensor(offset, shape, dtype, name in transposed)
        offset += tensors[name].num_bytes
    return tensors


def write(
    partial: str | os.PathLike, header: bytes, tensors: Mapping[str, Tensor], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a header, and each array, as it comes, to its place: one at a time is in memory.

    An array with more rows than its tensor is cut, one with fewer gets rows of zeros.
    """
    left = set(tensors)
    with open(partial, "wb") as file:
        file.write(header)
        for name, array in arrays:
            left.remove(name)
            file.seek(tensors[name].offset)
            _write_one(file, tensors[name], array)
    assert not left, f"not written: {sorted(left)}"


def _write_one(file: BinaryIO, tensor: Tensor, array: np.ndarray) -> None:
    array = array[: tensor.shape[0]]
    rows_missing = tensor.shape[0] - array.shape[0]
    assert array.shape[1:] == tensor.shape[1:] and not (rows_missing and tensor.is_transposed)
    stored = np.ascontiguousarray(array.T if tensor.is_transposed else array, DTYPES[tensor.dtype])
    file.write(stored.view(np.uint8).data)
    file.write(bytes(rows_missing * tensor.num_bytes // tensor.shape[0]))
