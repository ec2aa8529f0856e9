"""Weights as files: safetensors, the names of `parameters`, and in the metadata

    format   "attn-core/1", the version of the naming scheme
    config   JSON, {"attention": {..}}, {"additive": {..}} or {"transformer": {..}}, in which
             `dtype` is that of the arrays, and which names no `backend` and no `impl`: weights
             belong to every framework, and who reads them chooses

A file, or a mapping of names to arrays, is checked whole before anything is set, and written whole
before it takes its place: neither is ever half there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attn_core.config import nearest
from attn_core.model.additive import AdditiveConfig
from attn_core.model.config import AttentionConfig
from attn_core.model.parameters import VERSION, Plan, parameters
from attn_core.model.shards import read_index
from attn_core.model.transformer import TransformerConfig
from attn_core.spec import DTYPES, WIDTH

FREE = ("dtype", "backend", "impl", "dropout", "attention_dropout")
"""Fields of a config that do not change what weights mean."""
CHOSEN = ("backend", "impl")
"""Fields that who builds chooses: they do not travel with weights."""


class Loaded(NamedTuple):
    """What a weights file holds."""

    weights: dict[str, np.ndarray]
    config: AttentionConfig | AdditiveConfig | TransformerConfig


def save_weights(path: str | os.PathLike[str], weights: Any, config: Any = None) -> None:
    """Write weights, with the config that gives them a meaning, as safetensors.

    Args:
        path: of the file; what is there is replaced once the new one is complete.
        weights: name -> array, as `export_weights` gives; or a layer or model itself.
        config: AttentionConfig, AdditiveConfig or TransformerConfig; a layer's own where left
            out, which another may differ from in dropout, `dtype`, `backend` and `impl` alone.
            Its `backend` and `impl` are not written, and its `dtype` is that of the weights.

    Raises:
        TypeError, ValueError: the weights are not those of the config, or it is not the layer's;
            nothing has been written.
        FileNotFoundError: there is no folder of that name.
        ImportError: safetensors is missing.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`path` must lie in a folder that is there. Got {path}: make {folder} first."
        )
    if hasattr(weights, "export_weights"):
        held, own = weights.export_weights(), weights.config
        weights, config = held, own if config is None else _of_layer(config, own)
    plan = parameters(config)
    found = checked(plan, weights, None)
    library = _safetensors()
    held = {**config.to_mapping(), "dtype": _widest([x.dtype.name for x in found.values()])}
    held = {name: value for name, value in held.items() if name not in CHOSEN}
    metadata = {"format": VERSION, "config": json.dumps({config.TABLE: held})}
    whole = Path(path)
    part = whole.with_name(f"{whole.name}.{os.getpid()}.part")
    try:
        library.numpy.save_file(found, part, metadata)
        os.replace(part, whole)
    finally:
        part.unlink(missing_ok=True)


def _of_layer(config: Any, own: Any) -> Any:
    """A config that is given beside a layer, if it means what the layer's own does.

    Names and shapes would not tell: causal or not, scale and rotary base have no parameters.
    """
    if type(config) is not type(own):
        raise TypeError(
            f"`config` must be that of the layer, {type(own).__name__}. "
            f"Got {type(config).__name__}."
        )
    apart = config.differences(own, FREE)
    if apart:
        raise ValueError(
            f"`config` must be that of the layer, but for {', '.join(FREE)}. Got another, which "
            f"differs (`config`, the layer's): {'; '.join(apart)}."
        )
    return config


def load_weights(path: str | os.PathLike[str]) -> Loaded:
    """The weights and the config of a file, checked against one another.

    Raises:
        ValueError: the file is cut short or no safetensors, of another version, or its arrays are
            not those that its config asks for.
        FileNotFoundError: there is none.
        ImportError: safetensors is missing.
    """
    path = Path(path)
    read, metadata = _opened(path)
    version = metadata.get("format")
    if version != VERSION:
        raise ValueError(
            f"{path} must hold weights in the format {VERSION!r}, as `save_weights` writes them. "
            f"Got {version!r}."
        )
    config = _config(path, metadata.get("config", ""))
    weights = {name: _array(path, name, entry) for name, entry in read}
    return Loaded(checked(parameters(config), weights, None), config)


def read_arrays(path: str | os.PathLike[str], without: str) -> dict[str, np.ndarray]:
    """The arrays of anybody's safetensors file, or of the index of several; see `shards.py`.

    Those of bfloat16 are ml_dtypes'.

    without: a pattern of names that are left out, whatever they hold.

    Raises:
        ValueError: a file is cut short or no safetensors, or holds something but floats; or what
            an index says is not what its files hold.
        FileNotFoundError: there is none.
        ImportError: safetensors is missing.
    """
    path, found = Path(path), {}
    index = read_index(path) if path.suffix == ".json" else None
    for file in [path] if index is None else index.files:
        read, _ = _opened(file)
        kept = [(name, x) for name, x in read if not re.search(without, name)]
        if index is not None:
            index.check(file, [name for name, _ in read], [name for name, _ in kept])
        found.update({name: _array(file, name, x) for name, x in kept})
    return found


def weights_for(
    config: Any, plan: Plan, source: Any, held: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a path or a mapping, in the plan's order, found to fit a layer's config.

    Of a file the config must agree too, but for fields that do not change what weights mean.

    held: the dtype of each parameter, where the layer's framework can change it (`layer.half()`);
        the config's where left out. None may be given wider.
    """
    if isinstance(source, (str, os.PathLike)):
        loaded = load_weights(source)
        if type(loaded.config) is not type(config):
            raise ValueError(
                f"{source} must hold weights of a config `{config.TABLE}`. "
                f"Got `{loaded.config.TABLE}`."
            )
        apart = config.differences(loaded.config, FREE)
        if apart:
            raise ValueError(
                f"{source} must hold weights of this config. Got another's, which differs (ours, "
                f"the file's): {'; '.join(apart)}."
            )
        source = loaded.weights
    return checked(plan, source, held or dict.fromkeys(plan, config.dtype))


def check_held(name: str, shape: Any, wanted: tuple[int, ...]) -> None:
    """What a layer holds under a name is still the plan's: its owner can put other parts there.

    shape: of the parameter; None where there is none of that name.
    """
    if shape is None or tuple(shape) != wanted:
        raise ValueError(
            f"`{name}` must be a parameter of shape {wanted} in the layer, as its config says. "
            f"Got {'none' if shape is None else tuple(shape)}: the part has been replaced."
        )


def checked(plan: Plan, weights: Any, held: Mapping[str, str] | None) -> dict[str, np.ndarray]:
    """The weights in the plan's order, if they are exactly those of the plan.

    With the dtypes that hold them, none may be wider: nothing is narrowed silently. They come back
    contiguous and in the machine's byte order, as files and frameworks take them.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"`weights` must be a mapping of names to arrays, or a path. "
            f"Got {type(weights).__name__}."
        )
    unknown = [name for name in weights if name not in plan]
    if unknown:
        raise ValueError(
            f"`weights` must hold the parameters of this config only. Got {unknown[0]!r}"
            f"{_more(unknown)}.{nearest(unknown[0], tuple(plan))}"
        )
    missing = [name for name in plan if name not in weights]
    if missing:
        raise ValueError(
            f"`weights` must hold every parameter of this config. Got none called {missing[0]!r}"
            f"{_more(missing)}."
        )
    dtypes: Mapping[str, str | None] = held or dict.fromkeys(plan)
    return {name: _fitting(name, weights[name], plan[name].shape, dtypes[name]) for name in plan}


def _fitting(name: str, array: Any, shape: tuple[int, ...], dtype: str | None) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        # A framework's own arrays may lie another way round under the same name, and fit.
        raise TypeError(
            f"`{name}` must be a NumPy array, as `export_weights` gives it. Got "
            f"{type(array).__module__}.{type(array).__name__}; a framework's own state dict may "
            "hold the matrix transposed."
        )
    if array.dtype.name not in DTYPES:
        raise TypeError(f"`{name}` must be one of {', '.join(DTYPES)}. Got {array.dtype.name}.")
    if array.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}. Got {array.shape}.")
    if dtype is not None and not _holds(dtype, array.dtype.name):
        raise TypeError(
            f"`{name}` must not be wider than the layer's dtype {dtype}. Got "
            f"{array.dtype.name}: cast it first, nothing is narrowed silently."
        )
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _holds(wide: str, narrow: str) -> bool:
    """Whether every number of `narrow` is one of `wide`; the two of 16 bits hold each other not."""
    return wide == narrow or WIDTH[wide] > WIDTH[narrow]


def _widest(dtypes: list[str]) -> str:
    """The narrowest dtype that holds them all; of the two of 16 bits together, float32."""
    found = max(dtypes, key=lambda dtype: WIDTH[dtype])
    return found if all(_holds(found, dtype) for dtype in dtypes) else "float32"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _config(path: Path, written: str) -> Any:
    every: tuple[Any, ...] = (AttentionConfig, AdditiveConfig, TransformerConfig)
    kinds = {kind.TABLE: kind for kind in every}
    try:
        held = json.loads(written)
        (table,) = held
        return kinds[table].load(held)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} must hold the config of its weights, one of {', '.join(kinds)}. "
            f"Got {written[:80]!r}: {error}"
        ) from error


def _opened(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, not yet as arrays, and its metadata."""
    library = _safetensors()
    data = path.read_bytes()
    try:
        read = library.deserialize(data)
        size = int.from_bytes(data[:8], "little")
        return read, json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    except (library.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} must be a complete safetensors file. Got {len(data)} bytes: {error}"
        ) from error


_KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _array(path: Path, name: str, entry: Any) -> np.ndarray:
    kind = _KINDS.get(entry["dtype"])
    if kind is None:
        raise ValueError(
            f"{name!r} of {path} must be one of {', '.join(_KINDS)}. Got {entry['dtype']}."
        )
    if kind == "bfloat16":
        import ml_dtypes

        found = np.frombuffer(entry["data"], ml_dtypes.bfloat16)
    else:
        found = np.frombuffer(entry["data"], kind)
    return found.reshape(entry["shape"]).copy()


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "weights files are safetensors, which must be installed: "
            "pip install 'attn-core[weights]'."
        ) from error
    return safetensors
