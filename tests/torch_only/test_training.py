"""The examples' training step in torch: its optimisers against torch's, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training import Checkpoint
from training.optimisers import Adam, Momentum
from training.torch import Trainer

import attn_core

CONFIG = attn_core.TransformerConfig(
    kind="encoder", inputs=3, classes=5, width=8, depth=1, heads=2, dropout=0.2
)
RATE = 0.05


def batch(number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(number)
    patches = rng.standard_normal((6, 4, 3)).astype(np.float32)
    return {"given": patches}, rng.integers(5, size=6).astype(np.int32)


def trainer(optimiser: Any) -> Trainer:
    return Trainer(attn_core.build(CONFIG, backend="torch", seed=3), optimiser)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Momentum(), lambda ps: torch.optim.SGD(ps, RATE, momentum=0.9)),
        # Epsilon stands beside sqrt(v) before or after its correction: the same where it is 0.
        (Adam(epsilon=0.0), lambda ps: torch.optim.Adam(ps, RATE, (0.9, 0.98), eps=0.0)),
    ],
    ids=["momentum", "adam"],
)
def test_the_formulas_are_those_of_torch(ours: Any, theirs: Any) -> None:
    rng = np.random.default_rng(0)
    w = torch.tensor(rng.standard_normal(20))
    other = torch.nn.Parameter(w.clone())
    optimiser, slots = theirs([other]), tuple(torch.zeros_like(w) for _ in ours.SLOTS)
    for step in range(7):
        other.grad = torch.tensor(rng.standard_normal(20))
        w, *kept = ours.update(w, other.grad, slots, RATE * ours.factor(step))
        slots = tuple(kept)
        optimiser.step()
        torch.testing.assert_close(w, other.detach(), rtol=1e-12, atol=1e-12)


def test_a_step_is_a_step_of_torch() -> None:
    """The model's own loss, gradients and dropout, with the number of the step as the seed."""
    mine, model = trainer(Momentum()), attn_core.build(CONFIG, backend="torch", seed=3)
    optimiser = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    for number in range(4):
        arguments, targets = batch(number)
        logits = model(torch.as_tensor(arguments["given"]), seed=number)
        loss = F.cross_entropy(logits, torch.as_tensor(targets).long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        torch.testing.assert_close(mine.step(arguments, targets, RATE), loss.detach())
    found, wanted = mine.export().weights, model.export_weights()
    for name, w in wanted.items():
        np.testing.assert_allclose(found[name], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", [Momentum(), Adam()], ids=["momentum", "adam"])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(optimiser: Any, tmp_path: Path) -> None:
    whole = trainer(optimiser)
    for number in range(3):
        whole.step(*batch(number), RATE)
    whole.export().save(tmp_path, CONFIG)
    other = Trainer(attn_core.build(CONFIG, backend="torch", seed=8), optimiser)
    other.load(Checkpoint.read(tmp_path))
    assert other.steps == 3
    for number in range(3, 6):
        assert other.step(*batch(number), RATE) == whole.step(*batch(number), RATE)


def test_slots_lie_as_the_weights_do() -> None:
    """(in, out), whatever the framework holds: after one step the velocity is the gradient."""
    mine = trainer(Momentum())
    before = mine.export().weights
    mine.step(*batch(0), RATE)
    after = mine.export()
    assert set(after.slots) == {f"velocity.{name}" for name in before}
    for name, w in before.items():
        velocity = after.slots[f"velocity.{name}"]
        assert velocity.shape == w.shape
        np.testing.assert_allclose(after.weights[name], w - RATE * velocity, rtol=1e-5, atol=1e-7)
