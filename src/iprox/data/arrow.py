"""Rows as Arrow keeps them (Parquet, `datasets`), brought back to what was put in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

Decode = Callable[[Any], Any]


def unfilled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls within its columns.

    Objects of one column have the same keys in Arrow, and null where they had none: the schemas of two tools, say,
    would each hold the parameters of both. TRL advises to remove these (`remove_none_values`). Columns themselves stay.
    """
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def json_decoder(schema: pa.Schema) -> Decode | None:
    """What turns the columns of Arrow's JSON type, which `datasets` writes for objects of mixed types, into objects.

    Returns:
        A function of a row; None where no column holds such a type.
    """
    decoders = {field.name: decode for field in schema if (decode := _decoder(field.type)) is not None}
    if not decoders:
        return None
    return lambda row: {key: decoders[key](value) if key in decoders else value for key, value in row.items()}


def _decoder(kind: pa.DataType) -> Decode | None:
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        inner = {field.name: decode for field in fields if (decode := _decoder(field.type)) is not None}
        if inner:
            return lambda value: (
                value and {key: inner[key](each) if key in inner else each for key, each in value.items()}
            )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = _decoder(kind.value_type)
        if item is not None:
            return lambda value: value and [item(each) for each in value]
    return None
