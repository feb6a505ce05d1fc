"""Anybody's weights of a GPT-2, opened and checked, and loaded straight onto a mesh."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_prep.store.files import open_regular, read_json
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import names_of
from gpt_pretrain.train.weight_files import hub, llmc_file, safetensors_file, transformers_config
from gpt_pretrain.train.weight_files.names import HEAD, POSITIONS, TOKENS, name_of, shapes_of
from gpt_pretrain.train.weight_files.tensors import Tensor, TensorFile

log = logging.getLogger(__name__)

_SINGLE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_SHOWN = 5  # names in an error
_PICKLES = (b"PK\x03\x04", b"\x80")  # zip files, as torch writes since 1.6, and bare pickles


@dataclasses.dataclass(frozen=True)
class OpenedWeights:
    """Tensors by GPT-2's names, and what is known of the model they belong to.

    Attributes:
      where: for messages.
      sizes: fields of an `Architecture` that the files state.
      vocab_size: rows of the token embedding that are a token's; None where all may be.
      tokenizer_digest: of our exports; None where nobody recorded it.
      problems: what the files say of the model that ours cannot be, a line each.
    """

    where: str
    files: Mapping[str, TensorFile]
    sizes: Mapping[str, Any]
    vocab_size: int | None = None
    tokenizer_digest: str | None = None
    problems: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        return self.files[name].tensors[name]

    def read(self, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """A part of a parameter of ours, which has this shape, in float32; rows the file does not have are zeros."""
        if name != TOKENS:
            return self.files[name].read(name, index)
        first, end, _ = index[0].indices(shape[0])
        rows = self.files[name].read(name, (slice(first, end), *index[1:]))
        return np.pad(rows, ((0, end - first - len(rows)), (0, 0)))

    def check(self, spec: ModelSpec) -> None:
        """ValueError unless these are the weights of a model of this shape, and all of them."""
        problems = list(self.problems) or self._other_sizes(spec) or self._other_tensors(spec)
        if problems:
            raise ValueError(f"{self.where}: does not fit the model:\n" + "\n".join(problems))

    def _other_sizes(self, spec: ModelSpec) -> list[str]:
        """A line for each setting that differs."""
        found, (tokens_rows, width), (num_positions, _) = dict(self.sizes), self._table(TOKENS), self._table(POSITIONS)
        layers = [int(match[1]) for name in self.files if (match := re.match(r"h\.(\d{1,9})\.", name))]
        shown = {"n_embd": width, "num_positions": num_positions, "n_layer": max(layers, default=-1) + 1}
        found |= {name: value for name, value in shown.items() if value}
        settings = {"num_positions": "model.block_size (positions)"}
        lines = [
            f"  {settings.get(name, f'model.{name}')}: the file has {value!r:.80}, this run has {ours[name]}"
            for ours in [spec.identity]
            for name, value in found.items()
            if value != ours[name]
        ]
        tokens = self.vocab_size or tokens_rows
        if 0 < tokens < spec.vocab_size:
            lines.append(f"  vocabulary: the file has {tokens} tokens, the data has {spec.vocab_size}")
        if tokens > spec.padded_vocab_size:
            lines.append(
                f"  model.vocab_size: the file has {tokens} tokens, this run has {spec.padded_vocab_size} rows"
            )
        return lines

    def _table(self, name: str) -> tuple[int, int]:
        """Rows and columns of an embedding; zeros where it is missing or none."""
        shape = self.tensor(name).shape if name in self.files else ()
        return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)

    def _other_tensors(self, spec: ModelSpec) -> list[str]:
        """What is missing, unexpected, or of another shape."""
        expected, found = shapes_of(spec), self.files.keys()
        lines = [
            f"  {what}: {_some(sorted(names))}"
            for what, names in (("missing", expected.keys() - found), ("unexpected", found - expected.keys()))
            if names
        ]
        for name in sorted(expected.keys() & found):
            shape, wanted = self.tensor(name).shape, expected[name]
            if shape[1:] != wanted[1:] or len(shape) != len(wanted) or (name != TOKENS and shape != wanted):
                lines.append(f"  {name}: is {_by(shape)}, expected {_by(wanted)}")
        return lines[: 2 * _SHOWN]


def open_weights(source: str) -> OpenedWeights | None:
    """What `--from_pretrained` names, if it is no run of ours; None where it is one, or nothing.

    Raises ValueError for a file that is damaged, or would have to be unpickled.
    """
    if hub.is_hub(source):
        return _of_folder(hub.folder_of(source), source)
    path = Path(source)
    if path.is_dir():
        is_run = (path / "checkpoints").is_dir() or (path / "run" / "metadata").exists()
        is_folder = (path / _CONFIG).exists() or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
        return _of_folder(path, source) if is_folder and not is_run else None
    if not path.exists():
        return None
    with open_regular(path) as file:
        beginning = file.read(4)
    if llmc_file.is_llmc(beginning):
        file, header = llmc_file.read(path)
        fields = dataclasses.asdict(header)
        sizes = {name: fields[name] for name in ("n_layer", "n_head", "n_embd", "num_positions")}
        return OpenedWeights(source, dict.fromkeys(file.tensors, file), sizes, header.vocab_size)
    if beginning.startswith(_PICKLES):
        raise ValueError(_pickle_refused(source))
    return _of_safetensors([path], path.parent / _CONFIG, source)


def load(weights: OpenedWeights, abstract_params: Any) -> Any:
    """The parameters, split as the shardings of `abstract_params` say: each device gets the bytes of its own part."""

    def load_one(path, leaf):
        name = name_of(names_of(path))
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: weights.read(name, index or (), leaf.shape), dtype=leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(load_one, abstract_params)


def _of_folder(folder: Path, where: str) -> OpenedWeights:
    """A transformers folder. A name in its index leads to no other folder."""
    if (index := read_json(folder / _INDEX)) is not None and not (folder / _SINGLE).exists():
        names = index.get("weight_map") if isinstance(index, dict) else None
        names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
        if not names or any("/" in name or not name.endswith(".safetensors") for name in names):
            raise ValueError(f"{where}: {_INDEX} names {_some(names)}; expected .safetensors files beside it")
        return _of_safetensors([folder / name for name in names], folder / _CONFIG, where)
    if not (folder / _SINGLE).exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise ValueError(_pickle_refused(where))
        raise ValueError(f"{where}: no {_SINGLE} in it; expected a folder as save_pretrained of transformers writes it")
    return _of_safetensors([folder / _SINGLE], folder / _CONFIG, where)


def _of_safetensors(paths: list[Path], config_path: Path, where: str) -> OpenedWeights:
    config = read_json(config_path)
    if config is None:
        log.warning("%s: no config.json beside it, so the number of heads cannot be compared.", where)
    elif not isinstance(config, dict):
        raise ValueError(f"{config_path}: is no object of JSON")
    files: dict[str, TensorFile] = {}
    digest = None
    for path in paths:
        try:
            file, metadata = safetensors_file.read(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file, but {_INDEX} names it; download it again") from None
        files |= dict.fromkeys(file.tensors, file)
        digest = digest or metadata.get("tokenizer_digest")
    head = files.pop(HEAD, None)
    problems = transformers_config.problems_with(config or {})
    if head is not None and TOKENS in files and not _are_equal(head, files[TOKENS]):
        problems.append(f"  {HEAD}: differs from {TOKENS}, and our output embedding is the token embedding")
    sizes = {} if config is None else transformers_config.sizes_in(config)
    return OpenedWeights(where, files, sizes, None, digest, tuple(problems))


def _are_equal(head: TensorFile, tokens: TensorFile) -> bool:
    if head.tensors[HEAD].shape != (shape := tokens.tensors[TOKENS].shape) or not shape:
        return False
    pieces = [(slice(first, first + 4096),) for first in range(0, shape[0], 4096)]
    return all(np.array_equal(head.read(HEAD, piece), tokens.read(TOKENS, piece)) for piece in pieces)


def _pickle_refused(where: str) -> str:
    return (
        f"{where}: holds a pickle of torch, which runs code when it is opened, so it is not. Where transformers is "
        "installed, write safetensors by AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR), and name DIR."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}"[:400] + more


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
