"""Training in any framework: one step once per framework, everything around it once for all.

`training.torch`, `training.tf` and `training.jax` each have a class `Trainer` with these verbs, in
this order:

    Trainer(model, optimiser)
    step(arguments, targets, rate)   one step on one batch: the loss before it
    ask(verb, *arrays, **options)    model(..) or model.generate(..) in evaluation
    export()                         a Checkpoint
    load(checkpoint)                 go on from there, whoever wrote it

The loss is the mean over all targets of -log softmax(logits)[target]. Step number n, counted from
0, is the seed of what is dropped in it. Arrays come in as NumPy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import attn_core
from attn_core import config as flag

Batch = tuple[dict[str, np.ndarray], np.ndarray]
"""The model's arguments by name, `given` among them, and the targets."""


class Checkpoint(NamedTuple):
    """Where a training run stands, as NumPy arrays under neutral names.

    Attributes:
        weights: as `export_weights` gives them.
        slots: what the optimiser remembers, "velocity.encoder.0.attention.query.weight"; shaped
            and laid out as the weights.
        steps: how many have been made.
    """

    weights: dict[str, np.ndarray]
    slots: dict[str, np.ndarray]
    steps: int

    def save(self, folder: Path, config: Any) -> None:
        """Write `weights.safetensors`, which any framework loads, and `optimiser.npz`."""
        folder.mkdir(parents=True, exist_ok=True)
        attn_core.save_weights(folder / "weights.safetensors", self.weights, config)
        np.savez(folder / "optimiser.npz", steps=self.steps, **self.slots)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """What `save` wrote."""
        slots = dict(np.load(folder / "optimiser.npz"))
        steps = int(slots.pop("steps"))
        return cls(attn_core.load_weights(folder / "weights.safetensors").weights, slots, steps)


def trainer(config: Any, optimiser: Any, backend: str | None, seed: int = 0) -> Any:
    """A Trainer of the framework that `backend` or the flag names, or exit with what is missing."""
    try:
        model = attn_core.build(config, backend=backend, seed=seed)
    except (ValueError, ImportError, attn_core.UnsupportedError) as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error
    name = backend or flag.get("backend")
    return importlib.import_module(f"training.{name}").Trainer(model, optimiser)


def run(
    trainer: Any, batches: Iterable[Batch], steps: int, rate: Callable[[int], float], label: str
) -> list[float]:
    """Train for `steps` batches at the rate of each step, with a progress bar; every loss."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    losses: list[float] = []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=steps)
        # range first: zip must not take a batch that nobody trains on.
        for _, (arguments, targets) in zip(range(steps), batches, strict=False):
            losses.append(float(trainer.step(arguments, targets, rate(trainer.steps))))
            progress.update(task, advance=1, description=f"{label}, loss {losses[-1]:.4f}")
    return losses
