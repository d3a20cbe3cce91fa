"""Reading JSON that must be understood whole: a field that isn't is an error that names it and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_REQUIRED = object()


class Fields:
    """An object in a JSON file. Whoever reads it takes every field, then calls `close`.

    where: file and path of the object, for messages: "config.json: quantization_config"; of a whole file
        "config.json:".
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} is {values!r}, expected an object")
        self.values, self.where = dict(values), where

    def named(self, name: str) -> str:
        """A field, for messages."""
        return f"{self.where} {name}" if self.where.endswith(":") else f"{self.where}.{name}"

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The field's value; null and a missing field are `default`."""
        value = self.values.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.named(name)} is missing")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:  # True is an int in Python, not in JSON
            raise self.error(name, value, " or ".join(each.__name__ for each in kinds))
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """The field's value, which must be one of these; None allows null and a missing field."""
        value = self.values.pop(name, None)
        if not any(type(value) is type(each) and value == each for each in allowed):
            expected = " or ".join("null" if each is None else json.dumps(each) for each in allowed)
            raise self.error(name, value, expected)
        return value

    def names(self, name: str, *, required: bool = False) -> tuple[str, ...]:
        """A list of strings; empty where it is missing, unless it is required."""
        value = self.take(name, list, *([] if required else [[]]))
        if not all(isinstance(each, str) for each in value) or (required and not value):
            raise self.error(name, value, f"a list of {'at least one string' if required else 'strings'}")
        return tuple(value)

    def sizes(self, name: str) -> tuple[int, int] | None:
        """A list of two ints, or None where it is null or missing."""
        value = self.take(name, list, None)
        if value is not None and [type(each) for each in value] != [int, int]:
            raise self.error(name, value, "a list of two ints")
        return None if value is None else tuple(value)

    def positive(self, name: str, default: float) -> float:
        """A number that float32 holds; `default` where it is null or missing."""
        value = self.take(name, (int, float), default)
        if not 0 < value <= torch.finfo(torch.float32).max:  # NaN isn't
            raise self.error(name, value, "a positive number within float32")
        return float(value)

    def objects(self, name: str) -> dict[str, Fields]:
        """An object of objects, at least one."""
        values = self.take(name, dict)
        if not values:
            raise self.error(name, values, "at least one")
        return {key: Fields(value, f"{self.named(name)}.{key}") for key, value in values.items()}

    def object(self, name: str) -> Fields | None:
        """An object, or None where it is null or missing."""
        values = self.values.pop(name, None)
        return None if values is None else Fields(values, self.named(name))

    def error(self, name: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.named(name)} is {json.dumps(value, default=str)}, expected {expected}")

    def skip(self, *names: str) -> None:
        """Fields that say how a checkpoint was made and not what it is."""
        for name in names:
            self.values.pop(name, None)

    def close(self) -> None:
        """Raise ValueError where a field wasn't taken."""
        if self.values:
            name, value = next(iter(self.values.items()))
            raise ValueError(f"{self.named(name)} is {json.dumps(value, default=str)}, a field that isn't known")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError naming it where it can't be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value
