"""ONNX Runtime's attention on a CPU: com.microsoft.MultiHeadAttention, forward.

It takes (B, T, H * D) and is given arrays that lie so. `onnx`, which writes the one-node model, and
`onnxruntime` are nobody's dependency: where one is missing the subject is refused, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attn_core.benchmarks.calls import Call, Refused, forward_only, in_words
from attn_core.benchmarks.cases import Case

NAME = "onnxruntime"


def prepared(case: Case, direction: str, threads: int) -> Call:
    """A session of that one operator, on the case's arrays.

    Raises:
        Refused: a package is missing, or the case is not for it.
    """
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise Refused(
            f"{NAME} needs onnx and onnxruntime, which are optional: "
            f"pip install attn-core[bench]. Got no module {error.name}."
        ) from error
    forward_only(NAME, direction)
    in_words(NAME, case, "full", "causal")
    if case.dtype != "float32":
        raise Refused(f"{NAME}'s attention on a CPU takes float32. Got {case.dtype}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _model(onnx, case).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def given(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shape = (case.batch, case.length, case.heads * case.width)
        names = ("query", "key", "value")
        return {n: np.ascontiguousarray(arrays[n].swapaxes(1, 2)).reshape(shape) for n in names}

    def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (out,) = session.run(None, given(arrays))
        split = out.reshape(case.batch, case.length, case.heads, case.width)
        return {"out": split.swapaxes(1, 2)}

    fixed = given(case.arrays())
    return Call(lambda: session.run(None, fixed), answer)


def _model(onnx: Any, case: Case) -> Any:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shape = (case.batch, case.length, case.heads * case.width)
    node = helper.make_node(
        "MultiHeadAttention",
        ["query", "key", "value"],
        ["out"],
        domain="com.microsoft",
        num_heads=case.heads,
        unidirectional=int(case.mask == "causal"),
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, kind, shape) for n in ("query", "key", "value")],
        [helper.make_tensor_value_info("out", kind, shape)],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    # An IR version that runtimes of the last years read, rather than the newest onnx can write.
    return helper.make_model(graph, opset_imports=domains, ir_version=9)
