"""A step of training in JAX: one compiled program for each shape of batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from training import Checkpoint

Arrays = dict[str, Any]


class Trainer:
    """A model in training; `training` says what the verbs mean.

    Weights and slots are dictionaries by name; the model is given them when it is asked.
    """

    def __init__(self, model: Any, optimiser: Any) -> None:
        self.model, self.optimiser, self.steps = model, optimiser, 0
        model.train()
        self.definition, _ = nnx.split(model)
        self.weights = {name: model.get_parameter(name)[...] for name in model.plan}
        self.slots = {
            slot: {name: jnp.zeros_like(w) for name, w in self.weights.items()}
            for slot in optimiser.SLOTS
        }

    def step(self, arguments: dict[str, np.ndarray], targets: np.ndarray, rate: float) -> Any:
        """The loss of a batch before the step that it asks for."""
        rate = rate * self.optimiser.factor(self.steps)
        self.weights, self.slots, loss = _step(
            self.definition,
            self.optimiser,
            self.weights,
            self.slots,
            np.uint32(self.steps),
            np.float32(rate),
            arguments,
            targets,
        )
        self.steps += 1
        return loss

    def ask(self, verb: str, *arrays: np.ndarray, **options: Any) -> Any:
        """`model(..)` ("forward") or `model.generate(..)` in evaluation."""
        nnx.update(self.model, _state(self.weights))
        self.model.eval()
        call = self.model if verb == "forward" else getattr(self.model, verb)
        told = {n: jnp.asarray(x) if hasattr(x, "shape") else x for n, x in options.items()}
        return call(*[jnp.asarray(x) for x in arrays], **told)

    def export(self) -> Checkpoint:
        """Weights and slots under neutral names."""
        weights = {name: np.array(w) for name, w in self.weights.items()}
        slots = {
            f"{slot}.{name}": np.array(x)
            for slot, held in self.slots.items()
            for name, x in held.items()
        }
        return Checkpoint(weights, slots, self.steps)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.model.load_weights(checkpoint.weights)
        self.weights = {name: self.model.get_parameter(name)[...] for name in self.weights}
        for slot, held in self.slots.items():
            for name in held:
                held[name] = jnp.asarray(checkpoint.slots[f"{slot}.{name}"])
        self.steps = checkpoint.steps


def _state(weights: Arrays) -> Any:
    """Weights by name as the state of a model: a tree with a branch for each word."""
    tree: dict[str, Any] = {}
    for name, w in weights.items():
        *branches, leaf = name.split(".")
        at = tree
        for word in branches:
            at = at.setdefault(word, {})
        at[leaf] = nnx.Param(w)
    return nnx.State(tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    definition: Any,
    optimiser: Any,
    weights: Arrays,
    slots: dict[str, Arrays],
    number: Any,
    rate: Any,
    arguments: Arrays,
    targets: Any,
) -> tuple[Arrays, dict[str, Arrays], Any]:
    given = dict(arguments)
    first = given.pop("given")

    def loss_of(weights: Arrays) -> Any:
        logits = nnx.merge(definition, _state(weights))(first, **given, seed=number)
        found = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(found, targets[..., None], -1).mean()

    loss, gradients = jax.value_and_grad(loss_of)(weights)
    made: Arrays = {}
    kept: dict[str, Arrays] = {slot: {} for slot in optimiser.SLOTS}
    for name, w in weights.items():
        held = tuple(slots[slot][name] for slot in optimiser.SLOTS)
        made[name], *new = optimiser.update(w, gradients[name], held, rate)
        for slot, x in zip(optimiser.SLOTS, new, strict=True):
            kept[slot][name] = x
    return made, kept, loss
