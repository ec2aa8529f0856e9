"""Optimisers as formulas: the same arithmetic on arrays of any framework.

An optimiser remembers, for every weight, one array per name in SLOTS, all 0 at first. `factor` is
a Python number and the only part that counts steps; `update` is arithmetic alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Momentum:
    """v = momentum v + g;  w = w - rate v.

    Attributes:
        momentum: of the velocity.
    """

    SLOTS: ClassVar[tuple[str, ...]] = ("velocity",)

    momentum: float = 0.9

    def factor(self, step: int) -> float:
        """What the rate of step n = 0, 1, .. is multiplied by."""
        return 1.0

    def update(self, w: Any, g: Any, slots: tuple[Any, ...], rate: Any) -> tuple[Any, ...]:
        """The weight after a step, and its slots."""
        (v,) = slots
        v = self.momentum * v + g
        return w - rate * v, v


@dataclass(frozen=True)
class Adam:
    """m = a m + (1 - a) g;  v = b v + (1 - b) g g;  w = w - rate c m / (sqrt(v) + epsilon).

    c = sqrt(1 - b**n) / (1 - a**n) at the nth step. Source: Kingma & Ba, arXiv 1412.6980,
    section 2, the efficient order.

    Attributes:
        first, second: a and b.
        epsilon: keeps the quotient finite.
    """

    SLOTS: ClassVar[tuple[str, ...]] = ("first", "second")

    first: float = 0.9
    second: float = 0.98
    epsilon: float = 1e-8

    def factor(self, step: int) -> float:
        """c, of step n = 0, 1, .."""
        return float((1 - self.second ** (step + 1)) ** 0.5 / (1 - self.first ** (step + 1)))

    def update(self, w: Any, g: Any, slots: tuple[Any, ...], rate: Any) -> tuple[Any, ...]:
        """The weight after a step, and its slots."""
        m, v = slots
        m = self.first * m + (1 - self.first) * g
        v = self.second * v + (1 - self.second) * (g * g)
        return w - rate * m / (v**0.5 + self.epsilon), m, v
