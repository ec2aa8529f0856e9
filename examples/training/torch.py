"""A step of training in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from training import Checkpoint


class Trainer:
    """A model in training; `training` says what the verbs mean."""

    def __init__(self, model: Any, optimiser: Any) -> None:
        self.model, self.optimiser, self.steps = model, optimiser, 0
        self.weights = {name: model.get_parameter(name) for name in model.plan}
        self.slots = {
            slot: {name: torch.zeros_like(w) for name, w in self.weights.items()}
            for slot in optimiser.SLOTS
        }

    def step(self, arguments: dict[str, np.ndarray], targets: np.ndarray, rate: float) -> Any:
        """The loss of a batch before the step that it asks for."""
        given = {name: torch.as_tensor(x) for name, x in arguments.items()}
        rate = rate * self.optimiser.factor(self.steps)
        logits = self.model.train()(given.pop("given"), **given, seed=self.steps)
        wanted = torch.as_tensor(targets).to(torch.int64).flatten()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted)
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        with torch.no_grad():
            for (name, w), g in zip(self.weights.items(), gradients, strict=True):
                held = tuple(self.slots[slot][name] for slot in self.optimiser.SLOTS)
                new, *kept = self.optimiser.update(w, g, held, rate)
                w.copy_(new)
                for slot, x in zip(self.optimiser.SLOTS, kept, strict=True):
                    self.slots[slot][name] = x
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def ask(self, verb: str, *arrays: np.ndarray, **options: Any) -> Any:
        """`model(..)` ("forward") or `model.generate(..)` in evaluation."""
        model = self.model.eval()
        call = model if verb == "forward" else getattr(model, verb)
        told = {n: torch.as_tensor(x) if hasattr(x, "shape") else x for n, x in options.items()}
        return call(*[torch.as_tensor(x) for x in arrays], **told)

    def export(self) -> Checkpoint:
        """Weights and slots under neutral names; matrices lie the other way round in torch."""
        slots = {
            f"{slot}.{name}": self._turned(name, x.numpy()).copy()
            for slot, held in self.slots.items()
            for name, x in held.items()
        }
        return Checkpoint(self.model.export_weights(), slots, self.steps)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.model.load_weights(checkpoint.weights)
        for slot, held in self.slots.items():
            for name in held:
                x = self._turned(name, checkpoint.slots[f"{slot}.{name}"])
                held[name] = torch.tensor(np.ascontiguousarray(x))
        self.steps = checkpoint.steps

    def _turned(self, name: str, x: np.ndarray) -> np.ndarray:
        return x.T if self.model.plan[name].kind == "matrix" else x
