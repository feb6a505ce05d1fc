"""Text datasets of TensorFlow Datasets (TFDS) as input, without TensorFlow or a network.

    tfds:NAME[/CONFIG][:VERSION][@SPLIT]   prepared under $TFDS_DATA_DIR or ~/tensorflow_datasets
    tfds:DIRECTORY[@SPLIT]                 what `tfds.builder_from_directory` opens; / . or ~ first

SPLIT is all that TFDS takes, `train[:10%]` too; left out, it is train. The dataset must be stored
as ArrayRecord, the only format of TFDS that is read at any example and without TensorFlow.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.inputs.paths import TFDS
from data_prep.store.files import digest_json, read_json
from data_prep.store.locations import InputError, describe

NAME = re.compile(r"(\w+)(/[\w.+-]+)?(:[\w.*]+)?")
FORMAT = "array_record"
NOTES = ("dataset_info.json", "features.json")


class TFDSSplit:
    """The examples of one split, by index.

    Args:
      path: as in `--input`.
      text_column: name of the feature that is the text.
      provenance: names of features that are wanted beside it, where the dataset has them.

    Raises InputError: there is no such dataset or split on this machine, it is stored in another
    format, or has no such feature.
    """

    def __init__(self, path: str, text_column: str, provenance: Sequence[str]):
        from tensorflow_datasets.core.decode import DeserializeMethod

        self._text_column = text_column
        name, split = _parse(path)
        directory = Path(name).expanduser() if _is_directory(name) else _find(path, name)
        builder = _open(path, directory)
        # With the version, so that every worker opens the one that was inspected.
        self.path = f"{TFDS}{name if _is_directory(name) else _spelling(directory)}@{split}"
        _check_text(self.path, builder.info.features, text_column)
        present = set(builder.info.features) - {text_column}
        self._provenance = {name: name in present for name in provenance}
        try:
            # Raw: TFDS would decode each feature of each example, at a third of the speed.
            self._source = builder.as_data_source(
                split, file_format=FORMAT, deserialize_method=DeserializeMethod.RAW_BYTES
            )
            self._info = builder.info.splits[split]
        except ValueError as error:
            raise InputError(f"{self.path}: {' '.join(str(error).split())}") from None
        self.num_examples = int(self._info.num_examples)
        self._directory, self._version = directory, str(builder.version)

    def inspect(self) -> tuple[dict[str, Any], int]:
        """What changes with the dataset, and about how many bytes the split's examples hold.

        Raises InputError: a file of the split is missing.
        """
        instructions = self._info.file_instructions
        try:
            sizes = [os.path.getsize(each.filename) for each in instructions]
        except OSError as error:
            raise InputError(
                f"{self.path}: {describe(error)}; the dataset is not whole. Prepare or copy it again."
            ) from None
        # TFDS does not know the bytes of a slice; those of its files, compressed, are near enough.
        shares = (size * each.take // each.examples_in_shard for each, size in zip(instructions, sizes, strict=True))
        num_bytes = int(self._info.num_bytes) or sum(shares)
        files = [os.path.basename(each.filename) for each in instructions]
        notes = [read_json(self._directory / name) for name in NOTES]
        identity = {
            "path": self.path,
            "size": num_bytes,
            "version": self._version,
            "num_examples": self.num_examples,
            "info_digest": digest_json([notes, files, sizes]),
        }
        return identity, num_bytes

    def read(self, rows: np.ndarray) -> tuple[pa.LargeStringArray, dict[str, pa.Array]]:
        """Examples by index: texts, null where an example has none, and provenance as strings.

        Raises InputError, naming the example: its text is not UTF-8, or it is not there.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
        texts: list[bytes | None] = []
        provenance: dict[str, list[str | None]] = {name: [] for name in self._provenance}
        records = self._source.__getitems__(rows.tolist())
        for row, record in zip(rows.tolist(), records, strict=True):
            # ArrayRecord's reader gives this for every index of a file that was cut to 64 KB.
            if not record:
                raise InputError(f"{self.path}: example {row} is empty; the file was cut short")
            features = parse(record).features.feature
            texts.append(_value(features, self._text_column))
            for name, present in self._provenance.items():
                value = _value(features, name) if present else None
                provenance[name].append(_as_text(value))
        columns = {name: pa.array(values, pa.string()) for name, values in provenance.items()}
        try:
            return pa.array(texts, pa.large_binary()).cast(pa.large_string()), columns
        except pa.ArrowInvalid:
            raise self._not_utf8(rows, texts) from None

    def _not_utf8(self, rows: np.ndarray, texts: Sequence[bytes | None]) -> InputError:
        for row, text in zip(rows.tolist(), texts, strict=True):
            try:
                (text or b"").decode()
            except UnicodeDecodeError as error:
                return InputError(f"{self.path}: example {row}: {self._text_column!r} is not UTF-8: {error}")
        raise AssertionError("Arrow and Python agree on what is UTF-8")


def _parse(path: str) -> tuple[str, str]:
    """tfds:lm1b -> ("lm1b", "train"); tfds:./mine/1.0.0@test -> ("./mine/1.0.0", "test")."""
    name, at, split = path.removeprefix(TFDS).rpartition("@")
    if not at or "/" in split:  # the @ of a directory's name
        name, split = name + at + split, "train"
    if not _is_directory(name) and not NAME.fullmatch(name):
        raise InputError(
            f"{path}: expected {TFDS}NAME[/CONFIG][:VERSION][@SPLIT], such as tfds:lm1b@test, or "
            f"{TFDS}DIRECTORY[@SPLIT] with a directory that starts with / . or ~"
        )
    return name, split


def _is_directory(name: str) -> bool:
    return name.startswith(("/", ".", "~"))


def _data_dir() -> Path:
    # Not TFDS's own constant, which is what the environment was when TFDS was first imported.
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _find(path: str, name: str) -> Path:
    """Directory of a prepared dataset; of its newest version, unless the name says which."""
    from tensorflow_datasets.core import read_only_builder

    data_dir = _data_dir()
    try:
        # Unlike `tfds.builder`, this never asks Google's servers, and needs no code of the dataset.
        return Path(read_only_builder.builder_from_files(name, data_dir=data_dir).data_dir)
    except Exception as error:
        folder = data_dir / name.partition(":")[0]
        while not folder.is_dir() and folder != data_dir:
            folder = folder.parent
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        found = f"{folder} holds {', '.join(inside[:9]) or 'nothing'}"
        if not isinstance(error, ValueError):
            found += f"; {describe(error)}"
        raise InputError(
            f"{path}: not prepared on this machine: {found} (TFDS_DATA_DIR says where to look). "
            f"Prepare it by {_commands(name)}"
        ) from None


def _spelling(directory: Path) -> str:
    """As TFDS spells what lies there: data_dir/wikipedia/en/1.0.0 -> wikipedia/en:1.0.0."""
    name = directory.relative_to(_data_dir())
    return f"{name.parent}:{name.name}"


def _open(path: str, directory: Path) -> Any:
    """TFDS's builder of that directory, after checking the format that it is stored in."""
    import tensorflow_datasets as tfds

    if not (directory / "dataset_info.json").is_file():
        raise InputError(
            f"{path}: {directory} holds no dataset_info.json; expected the directory of one "
            "version of a prepared dataset, such as ~/tensorflow_datasets/lm1b/1.1.0"
        )
    try:
        builder = tfds.builder_from_directory(directory)
        formats = {format.value for format in builder.info.available_file_formats()}
    except Exception as error:
        raise InputError(f"{path}: TFDS cannot open {directory}: {describe(error)}") from error
    if FORMAT not in formats:
        raise InputError(
            f"{path}: {directory} is stored as {', '.join(sorted(formats)) or 'nothing known'}, "
            f"expected {FORMAT}, which is read without TensorFlow. With TensorFlow, convert it by "
            f"`tfds convert_format --dataset_version_dir={directory} --out_file_format={FORMAT}`; "
            f"or move it away and prepare it anew by {_commands(builder.name)}"
        )
    return builder


def _commands(name: str) -> str:
    return (
        f"`tfds build {name} --file_format={FORMAT}`, or in Python "
        f'`tfds.builder("{name}", file_format="{FORMAT}").download_and_prepare()`'
    )


def _check_text(path: str, features: Any, text_column: str) -> None:
    """InputError unless there is a feature of that name that is one string an example."""
    listed = ", ".join(f"{name} ({_kind(feature)})" for name, feature in sorted(features.items()))
    if text_column not in features:
        raise InputError(
            f"{path}: no feature {text_column!r}; the features are {listed}. Choose one with --text_column."
        )
    if _kind(features[text_column]) != "string":
        raise InputError(
            f"{path}: feature {text_column!r} is not text; the features are {listed}. Choose one with --text_column."
        )


def _kind(feature: Any) -> str:
    """string, int64[3], or the class of what is no tensor."""
    info = feature.get_tensor_info()
    shape, dtype = getattr(info, "shape", None), getattr(info, "np_dtype", None)
    if shape is None or dtype is None:
        return type(feature).__name__
    dtype = np.dtype(dtype)
    name = "string" if dtype.kind in "OSU" else dtype.name
    return name + (str(list(shape)) if shape else "")


def _value(features: Any, name: str) -> Any:
    """First value of a feature of a tf.train.Example: bytes, int or float; None if it has none."""
    kind = features[name].WhichOneof("kind")
    return next(iter(getattr(features[name], kind).value), None) if kind else None


def _as_text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)
