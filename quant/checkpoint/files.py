"""The tensors of a checkpoint's safetensors files, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .fields import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorFiles:
    """Which tensors there are, and where.

    paths: the files. names: file of each tensor. stored: what it is called there; the same until `rename`.
    """

    def __init__(self, opened: dict[Path, Any]):
        self._opened, self.paths = opened, list(opened)
        self.names: dict[str, Path] = {}
        self._layers: dict[str, str] = {}
        for path, file in opened.items():
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self.names:
                    raise ValueError(f"{path} has {name}, and so has {self.names[name].name}")
                self.names[name] = path
        self.stored = dict(zip(self.names, self.names, strict=True))

    def rename(self, of_model: Callable[[str], str]) -> None:
        """Call every tensor what the model does. Raises ValueError where that is the same for two."""
        stored: dict[str, str] = {}
        for name in self.names:
            if (other := stored.setdefault(of_model(name), name)) != name:
                raise ValueError(f"{self.where(other)} and {name} are both {of_model(name)} of the model")
        self.names = {name: self.names[theirs] for name, theirs in stored.items()}
        self.stored = stored
        self._layers = {layer_of(name): layer_of(theirs) for name, theirs in stored.items()}

    def layer(self, path: str) -> str:
        """The path in the files of one of the model's layers, where they have something of it."""
        return self._layers.get(path, path)

    def where(self, name: str) -> str:
        return f"{self.names[name]}: {self.stored[name]}"

    def read(self, name: str) -> Tensor:
        """A tensor of its own memory, so that the file may change later."""
        try:
            return self._opened[self.names[name]].get_tensor(self.stored[name]).clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.where(name)}: {error}") from None


def layer_of(name: str) -> str:
    """The path of what has a tensor."""
    return name.rpartition(".")[0]


@contextmanager
def open_tensors(folder: Path) -> Iterator[TensorFiles]:
    """The files that the folder's index names, or its only one.

    Raises ValueError where one is missing, truncated, no safetensors file, or doesn't hold what the index says.
    """
    placed: dict[str, str] | None = None
    if (folder / INDEX).exists():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise ValueError(
                f"{folder / INDEX}: weight_map is {type(placed).__name__}, expected an object of file names"
            )
        if not placed:
            raise ValueError(f"{folder / INDEX}: weight_map is empty, expected at least one tensor")
        for name in placed.values():
            if Path(name).name != name or name in ("", "..") or "\0" in name:  # never outside of the folder
                raise ValueError(f"{folder / INDEX}: weight_map names {name!r}, expected a file of this folder")
        if (folder / SINGLE).exists() and SINGLE not in placed.values():
            raise ValueError(f"{folder / INDEX} doesn't name {SINGLE}, which is there too: remove the one that is old")
    paths = [folder / name for name in (sorted(set(placed.values())) if placed is not None else [SINGLE])]
    with ExitStack() as stack:
        opened = {}
        for path in paths:
            try:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: {error}") from None
        files = TensorFiles(opened)
        for name, file in (placed or {}).items():
            if files.names.get(name) != folder / file:
                raise ValueError(f"{folder / INDEX}: weight_map places {name} in {file}, which doesn't have it")
        if placed is not None and (extra := files.names.keys() - placed.keys()):
            raise ValueError(f"{files.where(min(extra))} isn't in the index's weight_map")
        yield files
