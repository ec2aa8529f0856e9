"""What one field of a config may hold; messages say must, and what came."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from attn_core.config import nearest


def count(name: str, value: Any, least: int = 1) -> None:
    """An int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an int. Got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}. Got {value}.")


def numbers(name: str, value: Any, below: int) -> None:
    """A list of ascending ints, each at least 0 and below `below`."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be a list of ints. Got {value!r}.")
    for one in value:
        count(name, one, 0)
    if list(value) != sorted(set(value)) or any(one >= below for one in value):
        raise ValueError(
            f"`{name}` must be ascending numbers, each below {below}. Got {list(value)}."
        )


def number(name: str, value: Any, above: float, below: float = math.inf) -> None:
    """A finite number, above < value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number. Got {value!r}.")
    if not (above < value < below and math.isfinite(value)):
        reach = f"above {above:g}" if math.isinf(below) else f"between {above:g} and {below:g}"
        reach = "finite" if math.isinf(above) and math.isinf(below) else reach
        raise ValueError(f"`{name}` must be {reach}. Got {value}.")


def rate(name: str, value: Any) -> None:
    """A share that is dropped, 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number. Got {value!r}.")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1. Got {value}.")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be true or false. Got {value!r}.")


def choice(name: str, value: Any, known: tuple[str | None, ...]) -> None:
    """One of `known`, with the nearest in the message."""
    if value in known and not isinstance(value, bool):
        return
    words = tuple([word for word in known if word is not None])
    said = ", ".join(str(word) for word in known)
    raise ValueError(f"`{name}` must be one of {said}. Got {value!r}.{nearest(value, words)}")


def unread(config: Any, names: tuple[str, ...], reader: str, value: Any) -> None:
    """Fields that are read only where `reader` is `value`, which it is not: each at its default."""
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        if field.name in names and given != field.default:
            raise ValueError(
                f"`{field.name}` must be left out where `{reader}` is not {value!r}. "
                f"Got {given!r} and {reader}={getattr(config, reader)!r}."
            )


def heads(given: int, kv: int | None) -> None:
    """Query heads, and key heads that divide them."""
    count("heads", given)
    if kv is None:
        return
    count("kv_heads", kv)
    if given % kv:
        raise ValueError(
            "`heads` must be a multiple of `kv_heads`, since query head h reads key head "
            f"h // (heads / kv_heads). Got heads={given} and kv_heads={kv}."
        )


def head_width(width: int, given: int, head: int | None) -> None:
    """A width for each head that is given, or that `width` divides into."""
    if head is not None:
        count("head_width", head)
    elif width % given:
        raise ValueError(
            "`width` must be a multiple of `heads` where `head_width` is left out. "
            f"Got width={width} and heads={given}."
        )


def rotary(fraction: float, head: int) -> None:
    """An even number of a head's channels turn: fraction * head, but for rounding."""
    turned = round(fraction * head)
    if fraction > 1 or not turned or turned % 2 or abs(turned - fraction * head) > 1e-6:
        raise ValueError(
            "`rotary_fraction` must be at most 1 and make an even number of a head's channels "
            f"turn, since they turn in pairs. Got {fraction} of head_width={head}."
        )
