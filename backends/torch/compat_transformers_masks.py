"""The masks of transformers as rules: causal, windows, padding, packing, and no array of T x T.

transformers describes a mask by a function of (b, h, q, k), made of a few of its own, and asks the
registered mask interface for what its attention is to be given. Those few are read here, by what
they are and what they hold, as masks of our language:

    causal_mask_function                          k <= q
    sliding_window_overlay(W)                     q - k <= W - 1
    sliding_window_bidirectional_overlay(W)       abs(q - k) <= W
    packed_sequence_mask_function(ids)            ids[b, q] == ids[b, k]
    and_masks, or_masks                           of such
    a padding mask seen (B, Tk)                   seen[b, k], an operand

and go on their way as a Rule, which says that it is the boolean tensor (B, 1, Tq, Tk) and is one
as soon as anybody but our attention looks. What is made of other functions, is asked for a single
query (one row is no more than its keys), or within torch.compile, is transformers' own array.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import masking_utils as theirs
from transformers.masking_utils import sdpa_mask

from attn_core import masks
from attn_core.language.operands import operand
from attn_core.language.values import Mask, mask


class Rule(torch.Tensor):
    """A boolean mask (B, 1, Tq, Tk) of which only the rule is held.

    Attributes:
        rule: the mask in our language, of positions q = row + offset and of keys k.
        offset: where query row 0 stands, among the keys: an int, or an int tensor (B,).
        options: of transformers' `sdpa_mask`, which makes the array.
    """

    rule: Mask
    offset: Any
    options: dict[str, Any]

    @staticmethod
    def __new__(cls, rule: Mask, offset: Any, options: dict[str, Any]) -> Rule:
        size = (options["batch_size"], 1, options["q_length"], options["kv_length"])
        # The size of a tensor, and no storage: torch's form of a tensor that is something else.
        made: Rule = torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=torch.bool, device=options["device"]
        )
        made.rule, made.offset, made.options = rule, offset, options
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Rule({self.rule}, shape={tuple(self.shape)}, offset={self.offset})"

    def made(self) -> Any:
        """The array, as transformers makes it."""
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(**{**self.options, **skips})

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation on it is one on the array."""
        args, kwargs = pytree.tree_map_only(Rule, Rule.made, (args, kwargs or {}))
        return function(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = theirs.causal_mask_function,
    attention_mask: Any | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """What transformers hands to `attention_forward`: a Rule; None where shapes alone say that no
    mask is needed; else transformers' boolean array (B, 1, Tq, Tk).

    transformers also leaves it out where no token is padding, which it finds by looking at the
    values: a wait for the device at every step, and another implementation for another batch.

    Args:
        q_offset, kv_offset: the positions of query row 0 and of key 0.
        mask_function: of (b, h, q, k) in positions.
        attention_mask: (B, positions), True = a token.
    """
    open_ = attention_mask is None
    options = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
    }
    skips = {
        "allow_is_causal_skip": allow_is_causal_skip and open_,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip and open_,
    }
    if q_length == 1 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return sdpa_mask(**options, **skips)
    known, rule = reading(mask_function)
    if not known:
        return sdpa_mask(**options, **skips)
    if open_ and (rule is None or (skips["allow_is_causal_skip"] and _plain(options))):
        return None
    if attention_mask is not None:
        seen = padding(attention_mask, kv_offset, kv_length, device)
        rule = seen if rule is None else rule & seen
    offset = q_offset - kv_offset
    if isinstance(offset, torch.Tensor):
        offset = offset.reshape(-1).expand(batch_size)
    assert rule is not None
    return Rule(rule, offset, options)


def _plain(options: dict[str, Any]) -> bool:
    """Causal from the first key, as attention without a mask is."""
    square = options["q_length"] == options["kv_length"]
    return square and options["mask_function"] is theirs.causal_mask_function


def padding(seen: Any, start: int, count: int, device: Any) -> Mask:
    """The keys that are tokens, of `count` from `start` on; what lies beyond the mask is none."""
    seen = seen[:, start : start + count].to(device=device, dtype=torch.bool)
    if seen.shape[1] < count:
        seen = torch.nn.functional.pad(seen, (0, count - seen.shape[1]))
    table = operand(seen)
    return mask(lambda b, h, q, k: table[b, k])


def reading(function: Callable[..., Any]) -> tuple[bool, Mask | None]:
    """Whether a mask function of transformers is one of those above, and the mask that it is.

    The mask is None where everything is seen.
    """
    if function is theirs.causal_mask_function:
        return True, masks.causal()
    if function is theirs.bidirectional_mask_function:
        return True, None
    code = getattr(function, "__code__", None)
    if code not in (_AND, _OR, _WINDOW, _BAND, _PACKED):
        return False, None
    (held,) = [cell.cell_contents for cell in function.__closure__ or ()]  # of these, one
    if code == _WINDOW:
        return True, masks.window(left=held - 1)
    if code == _BAND:
        return True, masks.window(left=held, right=held)
    if code == _PACKED:
        return True, masks.segments(held)
    return _joined(held, code == _AND)


def _joined(functions: tuple[Any, ...], every: bool) -> tuple[bool, Mask | None]:
    """All of several, or any of them."""
    packed = every and any(getattr(one, "__code__", None) == _PACKED for one in functions)
    rules = []
    for one in functions:
        if packed and getattr(one, "__code__", None) == _WITHIN:
            # Within a sequence that is packed, distances of positions are those of the row.
            cells = dict(zip(one.__code__.co_freevars, one.__closure__ or (), strict=True))
            one = cells["mask_function"].cell_contents
        known, rule = reading(one)
        if not known:
            return False, None
        rules.append(rule)
    if not every and None in rules:
        return True, None
    parts = [rule for rule in rules if rule is not None]
    if not parts:
        return True, None
    return True, functools.reduce(operator.and_ if every else operator.or_, parts)


def _code(function: Any) -> Any:
    return function.__code__


_AND = _code(theirs.and_masks())
_OR = _code(theirs.or_masks())
_WINDOW = _code(theirs.sliding_window_overlay(1))
_BAND = _code(theirs.sliding_window_bidirectional_overlay(1))
_PACKED = _code(theirs.packed_sequence_mask_function(torch.zeros(0)))
_WITHIN = _code(
    theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, torch.zeros(0))
)
