"""keras.ops.dot_product_attention under each backend of Keras, compiled as that backend compiles.

It takes (B, T, H, D); our arrays are transposed by keras.ops inside the call, which a model that
keeps its heads so would not need: what that costs is in the figure.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from attn_core.benchmarks.calls import Attend, Made, in_words
from attn_core.benchmarks.cases import Case


def operation(backend: str) -> Made:
    """The operation in a process in which Keras uses that backend.

    Raises:
        ImportError: Keras has been imported with another, or cannot be.
    """

    def made(case: Case) -> Attend:
        # It is read once, when Keras is imported.
        if "keras" not in sys.modules:
            os.environ["KERAS_BACKEND"] = backend
        import keras

        if keras.backend.backend() != backend:
            raise ImportError(
                f"this process must use Keras with {backend}. Got one that imported it with "
                f"{keras.backend.backend()}."
            )
        in_words("Keras", case, "full", "causal")
        causal = case.mask == "causal"

        def turned(x: Any) -> Any:
            return keras.ops.transpose(x, (0, 2, 1, 3))

        def attend(query: Any, key: Any, value: Any) -> Any:
            given = [turned(x) for x in (query, key, value)]
            return turned(keras.ops.dot_product_attention(*given, is_causal=causal))

        return attend

    return made
