"""Dataclasses from JSON."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Record = TypeVar("Record")


def from_json(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """Builds a dataclass from its JSON, in which its tuples became lists.

    Args:
        kind: the dataclass.
        values: its fields by name; a field with a default may be absent, and one that is a dataclass is an object.

    Returns:
        The dataclass, every list a tuple.

    Raises:
        ValueError: a field is missing, unknown or of another type, or ``kind`` refuses a value.

    >>> from jaxspec.sampling import Sampling
    >>> from_json(Sampling, {"temperature": 0.5}).temperature
    0.5
    """
    hints = typing.get_type_hints(kind)
    try:
        record = kind(**{name: _value(hints.get(name), value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error
    for name, hint in hints.items():
        value = getattr(record, name)
        if not isinstance(value, _plain(hint)):
            raise ValueError(f"{name} is {value!r}")
    return record


def _value(hint: Any, value: Any) -> Any:
    """A field's value: a list is a tuple, and an object is the dataclass that the hint names."""
    if isinstance(value, list):
        return tuple(value)
    records: list[Any] = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
    return from_json(records[0], value) if records and isinstance(value, Mapping) else value


def _plain(hint: Any) -> Any:
    """The class that ``isinstance`` takes for a type hint; an int is a float, as PEP 484 has it."""
    if hint is float:
        return (float, int)
    return hint if isinstance(hint, types.UnionType) else typing.get_origin(hint) or hint
