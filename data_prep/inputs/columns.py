"""Columns of Arrow that hold text, in whatever way, and the fields of structs among them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.store.locations import InputError
from data_prep.store.spec import few


def find_column(path: str, schema: pa.Schema, name: str) -> tuple[str, ...]:
    """The column of texts: `("text",)`, or `("meta", "body")` for the field of a struct, by the name `meta.body`.

    A column that has the whole name goes before a field of a struct.

    Raises InputError, listing the columns: there is none, two have the name, or it does not hold text.
    """
    if schema.names.count(name) > 1:
        raise InputError(
            f"{path}: {schema.names.count(name)} columns have the name {name!r}. Rename all but one, so that it is "
            "clear which is the text."
        )
    found = (name,) if name in schema.names else _field_of_struct(schema, name)
    if found is None:
        raise no_column(path, name, schema.names)
    kind = schema.field(found[0]).type
    for field in found[1:]:
        kind = _inner(kind).field(field).type
    if not holds_text(kind):
        advice = ""
        if pa.types.is_struct(_inner(kind)):
            fields = [f"{name}.{_inner(kind).field(i).name}" for i in range(_inner(kind).num_fields)]
            advice = f". Name a field of it: {few(fields)}"
        raise InputError(
            f"{path}: column {name!r} holds {kind}, not text; the columns are "
            + ", ".join(f"{f.name} ({f.type})" for f in schema)
            + advice
        )
    return found


def no_column(path: str, name: str, names: Sequence[str]) -> InputError:
    """The error for a text column that is not there."""
    return InputError(
        f"{path}: no column {name!r}; the columns are {', '.join(names) or 'none'}. Choose one with --text_column."
    )


def _field_of_struct(schema: pa.Schema, name: str) -> tuple[str, ...] | None:
    """a.b.c -> ("a", "b", "c"), where each is a field of the one before; names may hold dots themselves."""

    def find(fields: Mapping[str, pa.DataType], rest: str) -> tuple[str, ...] | None:
        if rest in fields:
            return (rest,)
        for field, kind in fields.items():
            if rest.startswith(f"{field}.") and pa.types.is_struct(kind := _inner(kind)):
                inside = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
                if found := find(inside, rest[len(field) + 1 :]):
                    return (field, *found)
        return None

    return find({field.name: field.type for field in schema}, name)


def _inner(kind: Any) -> Any:
    """What a type stores: behind extension types, dictionaries and runs."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of the type are text, bytes that may be text, or null."""
    types, kind = pa.types, _inner(kind)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return is_text or is_bytes or types.is_fixed_size_binary(kind) or types.is_null(kind)


def take_column(batch: pa.RecordBatch, found: Sequence[str]) -> pa.Array:
    """A column, or a field of a struct, null where the struct is; of several columns of a name the first."""
    column = batch.column(batch.schema.get_all_field_indices(found[0])[0])
    for field in found[1:]:
        column = pc.call_function("struct_field", [_stored(column)], pc.StructFieldOptions([_index(column, field)]))
    return column


def _index(column: pa.Array, field: str) -> int:
    kind = _inner(column.type)
    return next(i for i in range(kind.num_fields) if kind.field(i).name == field)


def _stored(column: Any) -> Any:
    """A column without extension types, dictionaries and runs."""
    while True:
        if isinstance(column, pa.ExtensionArray):
            if column.type.extension_name == "arrow.uuid":
                return pa.array([value and str(value) for value in column.to_pylist()], pa.large_string())
            column = column.storage
        elif pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(column.type):
            column = pc.call_function("run_end_decode", [column])
        else:
            return column


def as_text(column: pa.Array) -> pa.LargeStringArray:
    """A column that `holds_text` as text. ArrowInvalid where it is not UTF-8; `first_not_utf8` says where."""
    column = _stored(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.large_string())
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    texts = column.cast(pa.large_string())
    # Parquet promises UTF-8 and nothing checks it; "\xff" would become other tokens.
    texts.validate(full=True)
    return texts


def first_not_utf8(column: pa.Array) -> tuple[int, bytes, UnicodeDecodeError] | None:
    """The first value that is not UTF-8: its place in the column, its bytes, and what is wrong with them."""
    column = _stored(column)
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    for place, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            (value or b"").decode()
        except UnicodeDecodeError as error:
            return place, value, error
    return None


def as_provenance(column: pa.Array) -> pa.Array:
    """A column of any type as text, in Python's words where Arrow has none."""
    with contextlib.suppress(pa.ArrowNotImplementedError, pa.ArrowInvalid):  # no cast, or not UTF-8: in our words
        texts = _stored(column).cast(pa.string())
        texts.validate(full=True)
        return texts
    if holds_text(column.type):  # not UTF-8
        values = _stored(column).cast(pa.large_binary()).to_pylist()
        return pa.array([value if value is None else _shown(value) for value in values], pa.string())
    return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())


def _shown(value: bytes) -> str:
    """Bytes that are text as it is, others as Python shows them."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return str(value)
