"""A step of training in TensorFlow: one tf.function for each shape of batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from training import Checkpoint


class Trainer:
    """A model in training; `training` says what the verbs mean."""

    def __init__(self, model: Any, optimiser: Any) -> None:
        self.model, self.optimiser, self.steps = model, optimiser, 0
        # Keras' variables hold TensorFlow's, which are what a tape watches.
        self.weights = {name: model.get_parameter(name).value for name in model.plan}
        self.slots = {
            slot: {name: tf.Variable(tf.zeros_like(w)) for name, w in self.weights.items()}
            for slot in optimiser.SLOTS
        }
        self._compiled = tf.function(self._step)

    def step(self, arguments: dict[str, np.ndarray], targets: np.ndarray, rate: float) -> Any:
        """The loss of a batch before the step that it asks for."""
        rate = rate * self.optimiser.factor(self.steps)
        given = {name: tf.convert_to_tensor(x) for name, x in arguments.items()}
        number = tf.constant(self.steps, tf.int64)
        rate = tf.constant(rate, tf.float32)
        loss = self._compiled(given, tf.convert_to_tensor(targets), number, rate)
        self.steps += 1
        return loss

    def ask(self, verb: str, *arrays: np.ndarray, **options: Any) -> Any:
        """`model(..)` ("forward") or `model.generate(..)` in evaluation."""
        told = {
            n: tf.convert_to_tensor(x) if hasattr(x, "shape") else x for n, x in options.items()
        }
        given = [tf.convert_to_tensor(x) for x in arrays]
        if verb == "forward":
            return self.model(*given, **told, training=False)
        return getattr(self.model, verb)(*given, **told)

    def export(self) -> Checkpoint:
        """Weights and slots under neutral names."""
        slots = {
            f"{slot}.{name}": x.numpy()
            for slot, held in self.slots.items()
            for name, x in held.items()
        }
        return Checkpoint(self.model.export_weights(), slots, self.steps)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.model.load_weights(checkpoint.weights)
        for slot, held in self.slots.items():
            for name, x in held.items():
                x.assign(checkpoint.slots[f"{slot}.{name}"])
        self.steps = checkpoint.steps

    def _step(self, arguments: dict[str, Any], targets: Any, number: Any, rate: Any) -> Any:
        given = dict(arguments)
        with tf.GradientTape() as tape:
            logits = self.model(given.pop("given"), **given, seed=number, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, list(self.weights.values()))
        for (name, w), g in zip(self.weights.items(), gradients, strict=True):
            held = [self.slots[slot][name] for slot in self.optimiser.SLOTS]
            # The gradient of a table is a sum over some of its rows.
            new, *kept = self.optimiser.update(
                tf.convert_to_tensor(w),
                tf.convert_to_tensor(g),
                tuple(tf.convert_to_tensor(x) for x in held),
                rate,
            )
            w.assign(new)
            for variable, x in zip(held, kept, strict=True):
                variable.assign(x)
        return loss
