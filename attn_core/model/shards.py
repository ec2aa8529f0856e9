"""Weights in several files: the index that says which array lies in which.

    {"metadata": {..}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors", ..}}

as transformers writes it beside them, model.safetensors.index.json. The files are read one after
the other, and hold exactly what the index says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from attn_core.config import read


class Index(NamedTuple):
    """What an index says, checked.

    Attributes:
        path: of the index itself.
        places: name of an array -> the file that holds it, beside the index.
    """

    path: Path
    places: dict[str, Path]

    @property
    def files(self) -> list[Path]:
        """Each file once, in the order of the names."""
        return list(dict.fromkeys(self.places.values()))

    def check(self, file: Path, held: list[str], read: list[str]) -> None:
        """A file holds what the index says of it.

        held: the names in it. read: those of them that are asked for, of which the index knows.
        """
        for name, place in self.places.items():
            if place == file and name not in held:
                raise ValueError(
                    f"{file} must hold {name!r}, as {self.path.name} says. Got none of that name."
                )
        for name in read:
            if self.places.get(name) != file:
                raise ValueError(
                    f"{self.path} must name every array of its files. Got {name!r} in "
                    f"{file.name}, which it does not name there."
                )


def read_index(path: Path) -> Index:
    """The index of several files.

    Raises:
        ValueError: it is none, or names a file that is no safetensors beside it.
        FileNotFoundError: it, or a file that it names, is not there.
    """
    told = read(path)
    named = told.get("weight_map") if isinstance(told, Mapping) else None
    if not isinstance(named, Mapping) or not named:
        raise ValueError(
            f"{path} must be a safetensors file, or an index with a `weight_map` of names to "
            f"files. Got {_shortly(told)}."
        )
    places = {}
    for name, file in named.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ValueError(
                f"`weight_map` of {path} must name files beside it. Got {file!r} for {name!r}."
            )
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"`weight_map` of {path} must name safetensors files. Got {file!r} for {name!r}: "
                "save the model as safetensors, and nothing in it is run."
            )
        places[str(name)] = path.with_name(file)
    for place in dict.fromkeys(places.values()):
        if not place.is_file():
            raise FileNotFoundError(f"{path} names {place.name}, which must lie beside it.")
    return Index(path, places)


def _shortly(told: object) -> str:
    if isinstance(told, Mapping):
        return f"the keys {', '.join(map(repr, list(told)[:5]))}"
    return type(told).__name__
