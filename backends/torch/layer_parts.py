"""What layers and models of torch are made of: projections, norms, angles, what is dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from attn_core.backends.torch.arrays import DTYPES, autocasts, dense
from attn_core.backends.torch.philox import keep, words
from attn_core.backends.torch.tiles import constant
from attn_core.language.values import Dropout, drop_threshold
from attn_core.model import calls
from attn_core.model.positions import LOW, TURN, wheel
from attn_core.model.seeds import key, step_seed

Array = Any


def made(config: Any, device: Any) -> dict[str, Any]:
    """Keyword arguments with which torch makes a parameter of a config."""
    where = torch.get_default_device() if device is None else torch.device(device)
    return {"device": where, "dtype": DTYPES[config.dtype]}


def linear(inner: int, outer: int, bias: bool, **make: Any) -> torch.nn.Module:
    """A Linear without first values: torch would draw them from its global generator."""
    return torch.nn.utils.skip_init(torch.nn.Linear, inner, outer, bias=bias, **make)


def embedding(rows: int, width: int, **make: Any) -> torch.nn.Module:
    """An Embedding without first values."""
    return torch.nn.utils.skip_init(torch.nn.Embedding, rows, width, **make)


class Norm(torch.nn.Module):
    """Layer norm or RMS norm over the last axis, in float32 at least.

    layer   (x - mean) / sqrt(variance + epsilon) * scale + bias
    rms     x / sqrt(mean(x**2) + epsilon) * scale
    """

    def __init__(self, width: int, kind: str, bias: bool, epsilon: float, **make: Any) -> None:
        super().__init__()
        self.kind, self.epsilon = kind, epsilon
        self.scale = torch.nn.Parameter(torch.ones(width, **make))
        self.register_parameter(
            "bias", torch.nn.Parameter(torch.zeros(width, **make)) if bias else None
        )

    def forward(self, x: Array) -> Array:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.epsilon)
        wide = wide * self.scale.to(wide.dtype)
        if self.bias is not None:
            wide = wide + self.bias.to(wide.dtype)
        return wide.to(x.dtype)


ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}

HELD: dict[tuple[float, int, torch.device], Array] = {}
"""What `wheel_of` has made."""


def wheel_of(base: float, channels: int, device: torch.device) -> Array:
    """The words of `channels` that turn, int64 (2, channels / 2), which never overflow in products.

    They follow from the config, and no module holds them: what is moved, cast, emptied or loaded
    leaves them as they are. A device is given them once, so that no call waits for a copy.
    """
    place = base, channels, device
    if place not in HELD:
        made = wheel(base, channels).astype(np.int64)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return constant(made, torch.int64, device)  # of the graph, and filled when it runs
        # Whatever transforms or records the first call, this is a plain tensor.
        with torch._C._DisableFuncTorch(), _disable_current_modes(), torch.inference_mode(False):
            HELD[place] = torch.from_numpy(made).to(device)
    return HELD[place]


# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
wheel_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def turns_for(x: Array, base: float, channels: int) -> Array:
    """The words where x lies; of a tensor that only stands for one, another such."""
    if type(x) is torch.Tensor:
        return wheel_of(base, channels, x.device)
    return torch.as_tensor(wheel(base, channels), device=x.device).to(torch.int64)


def angles(turns: Array, positions: Array, dtype: torch.dtype) -> Array:
    """Radians of every channel pair, (B, T, pairs), at int positions (B, T), as model.positions."""
    high, low = turns
    whole = positions.to(torch.int64)[..., None] * high
    wrapped = ((whole + 2**31) & 0xFFFFFFFF) - 2**31
    rest = positions[..., None].to(dtype) * low.to(dtype)
    return wrapped.to(dtype) * TURN + rest * LOW


def rotated(x: Array, turns: Array, positions: Array, pairs: str) -> Array:
    """Heads (B, T, H, D) turned by their positions (B or 1, T); the first channels turn."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = angles(turns, positions, dtype)[:, :, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    count = 2 * turns.shape[1]
    part, rest = x[..., :count].to(dtype), x[..., count:]
    if pairs == "half":
        a, b = part.chunk(2, -1)
        part = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = part[..., 0::2], part[..., 1::2]
        part = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([part.to(x.dtype), rest], -1)


def sinusoidal(turns: Array, positions: Array, dtype: torch.dtype) -> Array:
    """PE of int positions (B, T), (B, T, width): sines and cosines in turn, float32 at least."""
    angle = angles(turns, positions, torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.stack([torch.sin(angle), torch.cos(angle)], -1).flatten(-2).to(dtype)


def weights_dropout(rate: float, seed: Any, site: int, training: bool) -> Dropout | None:
    """The dropout of attention weights at a site; None in evaluation."""
    if not training or not rate:
        return None
    seed = step_seed(seed)
    low, high = key(seed if isinstance(seed, tuple) else words(seed), site)
    if isinstance(seed, tuple):
        return Dropout(rate, (low, high))
    # Both words as one int64, of which the upper has the sign; no step on the way overflows.
    return Dropout(rate, low + (((high + 2**31) & 0xFFFFFFFF) - 2**31) * 2**32)


def hidden_dropout(
    x: Array, rate: float, seed: Any, site: int, positions: Array, training: bool
) -> Array:
    """x (B, T, C) with entries dropped by position and channel; x itself in evaluation."""
    drop = weights_dropout(rate, seed, site, training)
    if drop is None:
        return x
    kept = keep(drop_threshold(rate), drop.seed, x.shape[0], 1, positions, x.shape[2])[:, 0]
    return torch.where(kept, x * (1 / (1 - rate)), 0.0)


def integers(name: str, given: Any, device: Any) -> Array:
    """Host ints or a tensor as int32, on the device.

    What int32 does not hold is refused where it lies on the host, and else held at its ends.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        calls.check_int32(name, given, given)
        return torch.full((), given, dtype=torch.int32, device=device)  # without a copy
    found = torch.as_tensor(given)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"`{name}` must be integers. Got {str(found.dtype).split('.')[-1]}.")
    if found.dtype in (torch.int64, torch.uint32, torch.uint64):
        if found.is_cpu and known(found) and found.numel():
            calls.check_int32(name, *[int(x) for x in found.to(torch.int64).aminmax()])
        else:
            found = found.to(torch.int64).clamp(-(2**31), 2**31 - 1)
    return found.to(device, torch.int32)


def check_tensors(**given: Any) -> None:
    """What is given is on no host and dense: torch's modules read tensors."""
    for name, x in given.items():
        if x is not None and not isinstance(x, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a torch.Tensor. "
                f"Got {type(x).__module__}.{type(x).__name__}: torch.as_tensor({name}) makes one."
            )
        if x is not None:
            dense(f"`{name}`", x)


def check_dtype(part: Any, **given: Any) -> None:
    """Inputs have the dtype of the torch.nn.Linear that reads them, but under autocast."""
    if type(part) is not torch.nn.Linear:
        return
    kind = part.weight.device.type
    if autocasts(kind) and torch.is_autocast_enabled(kind):
        return
    for name, x in given.items():
        if x.dtype != part.weight.dtype:
            ours, got = [str(y.dtype).split(".")[-1] for y in (part.weight, x)]
            raise TypeError(
                f"`{name}` must be of the layer's dtype, {ours}. Got {got}: cast it, or the layer "
                f"with `.to(torch.{got})`."
            )


def indices(x: Array) -> Array:
    """The indices of the rows of x (B, T, ..), int32 (1, T)."""
    return torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None]


def on_host(x: Array) -> np.ndarray | None:
    """The values of a tensor that the host holds; None where it would have to wait for them."""
    return x.detach().numpy() if x.device.type == "cpu" and known(x) else None


def known(x: Array) -> bool:
    """Whether the values of a tensor can be read: nothing traces, transforms or records."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) is not torch.Tensor or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
