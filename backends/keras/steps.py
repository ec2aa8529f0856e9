"""The number of a training step, counted by the model itself."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attn_core.model import fields


@keras.saving.register_keras_serializable(package="attn_core")
class Steps(keras.layers.Layer):
    """Counts the steps of training from 0, for the `seed` of layers with dropout.

        class Model(keras.Model):
            def __init__(self):
                self.steps = Steps()
                ...

            def call(self, x, training=False):
                seed = self.steps.next() if training else None
                return self.attention(x, seed=seed, training=training)

    That is what `optimizer.iterations` counts within `fit`, which on JAX no model can read: while
    it trains there, Keras hands it its own variables alone. This count is one of those, not
    trained, and saved with the model: training that is taken up again goes on counting.

    Args:
        start: the first number, int32.
        name: as in every layer of Keras.
    """

    def __init__(self, start: int = 0, *, name: str | None = None) -> None:
        super().__init__(name=name, trainable=False, dtype="float32")
        fields.count("start", start, 0)
        self.start = start
        first = keras.initializers.Constant(start)
        self.count = self.add_weight((), first, "int32", trainable=False, name="count")
        self.built = True

    def next(self) -> Any:
        """The number of this step, int32 (), and one more at the next call."""
        number = ops.convert_to_tensor(self.count) + 0  # a copy: torch counts in place
        self.count.assign(number + 1)
        return number

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal layer of; the count apart."""
        return {"start": self.start, "name": self.name}
