"""Who loads whom, and who may import whom."""

import ast
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "attn_core": ROOT / "attn_core",
    "attn_core.backends": ROOT / "backends",
    "attn_core.kernels": ROOT / "kernels",
    "attn_core.conformance": ROOT / "conformance",
    "attn_core.benchmarks": ROOT / "benchmarks",
}
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "triton"}
PEERS = {"transformers"}
OWN = {"numpy": set(), "torch": {"torch"}, "tf": {"tensorflow", "keras"}, "jax": {"jax", "flax"}}
# A room for Keras on any of its backends, so it imports keras and none of them.
ROOMS = OWN | {"keras": {"keras"}}
MODULE = {"numpy": "numpy", "torch": "torch", "tf": "tensorflow", "jax": "jax"}

LAYERS = {
    *("portable", "layer_parts", "layers", "additive", "model_parts", "models"),
    *("linen", "compat_flax"),
}
"""Files of a backend that are loaded only when a layer is asked for."""

# What is loaded: subprocesses ------------------------------------------------------------------


@cache
def loaded_after(*steps):
    """The root modules in memory after each step of code, in a fresh process. Asked once.

    What is loaded stays loaded: what a later step brings is what was not there before it, so that a
    framework by itself, and what of ours follows it, are asked in one process.
    """
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    code = "\n".join(f"{step}\n{report}" for step in steps)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [frozenset(json.loads(line)) for line in run.stdout.splitlines()[-len(steps) :]]


def loaded_by(code):
    return loaded_after(code)[0]


def installed(backend):
    return pytest.mark.skipif(
        importlib.util.find_spec(MODULE[backend]) is None, reason=f"{MODULE[backend]} is missing"
    )


# The doors of attn_core.compat, and the room that each leads into.
DOORS = {
    "torch": "torch",
    "transformers": "torch",
    "jax": "jax",
    "flax": "jax",
    "keras": "keras",
}
# Where Keras runs, and what it is then allowed to bring.
KERAS = {"tensorflow": "tf", "jax": "jax", "torch": "torch"}


@pytest.mark.parametrize(
    "runs_on", [pytest.param(name, marks=installed(short)) for name, short in KERAS.items()]
)
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is missing")
def test_the_room_for_keras_loads_no_more_than_keras(runs_on):
    setting = f"import os; os.environ['KERAS_BACKEND'] = {runs_on!r}\n"
    alone, ours = loaded_after(
        f"{setting}import keras; keras.ops.ones(3)",
        "from attn_core.compat.keras import dot_product_attention\n"
        "import numpy as np\n"
        "x = np.ones((1, 3, 2, 4), 'float32')\n"
        "dot_product_attention(x, x, x, is_causal=True)\n"
        "from attn_core.backends.keras import MultiHeadAttention\n"
        "MultiHeadAttention(width=4, heads=2)(x[0])",
    )
    assert not (ours & FRAMEWORKS) - alone - {"triton"}
    assert "keras" in ours


def test_the_doors_of_compat_load_nothing_until_they_are_opened():
    code = """
import attn_core
from attn_core import compat
compat.from_hf_window(4) & compat.from_jax_window(3)
"""
    assert not loaded_by(code) & (FRAMEWORKS | PEERS)


@installed("torch")
def test_opening_the_door_to_torch_loads_torch_alone():
    opened = loaded_by("from attn_core import compat; compat.torch.scaled_dot_product_attention")
    assert "torch" in opened
    assert not opened & ({"tensorflow", "jax", "flax", "keras"} | PEERS)


@installed("jax")
def test_opening_the_door_to_jax_loads_no_flax():
    opened = loaded_by("from attn_core.compat.jax import dot_product_attention")
    assert "jax" in opened
    assert not opened & {"tensorflow", "torch", "flax", "keras"}


each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=installed(name)) for name in OWN]
)


def test_importing_attn_core_loads_no_framework():
    assert not loaded_by("import attn_core") & (FRAMEWORKS | PEERS)


def test_asking_the_doors_loads_no_framework():
    code = """
import attn_core
attn_core.masks.causal() & attn_core.mask(lambda b, h, q, k: q - k < 3)
attn_core.scores.softcap(30.0)
attn_core.Dropout(0.1, 3)
attn_core.AttentionConfig(width=8, heads=2)
attn_core.build, attn_core.save_weights
attn_core.config.set(backend="torch")
attn_core.backends
"""
    assert not loaded_by(code) & FRAMEWORKS


@each_backend
def test_a_backend_loads_no_more_than_its_framework(backend):
    """Imported, or used: then triton is left out, which torch itself loads, late, where it is."""
    alone, imported, used = loaded_after(
        f"import {MODULE[backend]}",
        f"import attn_core.backends.{backend}",
        "import numpy as np, attn_core\n"
        "x = np.ones((1, 2, 3, 4), 'float32')\n"
        f"with attn_core.use(backend={backend!r}):\n"
        "    attn_core.attention(x, x, x, mask=attn_core.masks.causal())",
    )
    assert not (imported & FRAMEWORKS) - alone
    assert not (used & FRAMEWORKS) - alone - {"triton"}
    assert MODULE[backend] in used


@installed("jax")
def test_layers_of_jax_load_flax_and_no_other_framework():
    alone, ours = loaded_after(
        "from flax import linen, nnx",
        "import numpy as np, attn_core\n"
        "layer = attn_core.build(attn_core.AttentionConfig(8, 2, backend='jax'))\n"
        "layer(np.ones((1, 2, 8), 'float32'))",
    )
    assert ours & FRAMEWORKS == alone & FRAMEWORKS
    assert "flax" in alone


def test_a_backend_is_found_by_attribute():
    assert loaded_by("import attn_core; assert attn_core.backends.numpy.owns is not None")


# What may import what: the syntax tree ---------------------------------------------------------


def modules():
    """(real module name, path) of every shipped file."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


def imports(tree, module, is_package):
    """(imported name, lazily, line): absolute, with `from a import b` read as a.b."""

    def visit(node, lazily):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, lazily, child.lineno
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = module.split(".")[: None if is_package else -1]
                    above = above[: len(above) - child.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in child.names:
                    yield f"{base}.{alias.name}", lazily, child.lineno
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            # Under TYPE_CHECKING nothing is ever loaded.
            types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from visit(child, lazily or function or types)

    yield from visit(tree, False)


def within(name, package):
    return name == package or name.startswith(package + ".")


def objection(module, name, lazily):
    """Why `module` may not import `name`, or None."""
    root = name.split(".")[0]
    if root in sys.stdlib_module_names:
        return None
    if within(name, "attn_core.benchmarks") and not within(module, "attn_core.benchmarks"):
        # They stand at the end of every road: only the command line leads there.
        allowed = lazily and module in ("attn_core.cli_bench", "attn_core.cli_gpu")
        return None if allowed else "nothing depends on the benchmarks"
    if within(module, "attn_core.benchmarks"):
        return benchmarks_objection(module, name, root, lazily)
    if within(module, "attn_core.backends"):
        return backend_objection(module, name, root, lazily)
    if within(module, "attn_core.kernels"):
        allowed = root == "triton" or within(name, "attn_core.language")
        allowed = allowed or within(name, "attn_core.kernels")
        # What mends Triton's interpreter has its numbers in hand, which are NumPy's.
        allowed = allowed or (root == "numpy" and "interpreter" in module.rsplit(".", 1)[1])
        return None if allowed else "kernels import triton and attn_core.language, nothing else"
    if within(module, "attn_core.conformance"):
        return conformance_objection(module, name, root, lazily)
    return core_objection(module, name, root, lazily)


def core_objection(module, name, root, lazily):
    if within(name, "attn_core.compat"):
        if not within(module, "attn_core.compat"):
            allowed = module == "attn_core" and name == "attn_core.compat"
            return None if allowed else "the drop-ins stand on the rest, and nothing on them"
        if name.split(".")[2:3] in [[door] for door in DOORS] and not lazily:
            return "a door of attn_core.compat is opened when it is spoken of"
    door = module.removeprefix("attn_core.compat.")
    if door in DOORS and within(name, f"attn_core.backends.{DOORS[door]}"):
        return None  # a thin door, which leads into one room
    if within(name, "attn_core.backends"):
        if module == "attn_core.registry":
            return None if lazily else "the registry loads a backend when it is named, not before"
        if module == "attn_core" and name == "attn_core.backends":
            return None  # the door `attn_core.backends.torch`, which asks the registry
        return "backends are reached by name, through the registry"
    if within(name, "attn_core.kernels"):
        # The command line looks at them, too.
        allowed = lazily and module in ("attn_core.cli_kernels", "attn_core.cli_gpu")
        return None if allowed else "kernels are reached from backends only"
    if within(name, "attn_core.conformance"):
        # The command line and the package's own door are how one gets there.
        allowed = lazily and module in ("attn_core", "attn_core.cli_conformance")
        return None if allowed else "attn_core does not depend on its judge"
    if module == "attn_core.reference" and root == "attn_core":
        return "the judge shares nothing with what it judges"
    if root in ("attn_core", "numpy"):
        return None
    if module.startswith("attn_core.cli") and root in ("typer", "rich"):
        return None
    if lazily and module == "attn_core.explain_text" and root == "rich":
        return None  # a report becomes a table where somebody prints it with rich
    if lazily and module == "attn_core.model.weights" and root == "safetensors":
        return None  # optional, and asked for by name: a file of weights
    if lazily and root in ("yaml", "matplotlib", "ml_dtypes"):
        return None  # optional, and asked for by name: a config file, a picture, NumPy's bfloat16
    return "attn_core holds the standard library and NumPy only"


def backend_objection(module, name, root, lazily):
    own = module.split(".")[2] if module != "attn_core.backends" else None
    # What launches kernels: it loads triton, so it is itself imported where it is used.
    launcher = module.split(".")[-1].startswith("triton_")
    if within(name, "attn_core.backends"):
        loads = any(part.startswith("triton_") for part in name.split("."))
        if loads and not (lazily or launcher):
            return "what loads triton is imported inside functions"
        other = name.split(".")[2:3]
        if own == "tf" and other == ["keras"] and lazily:
            return None  # whose layers are those of Keras
        return None if own and other in ([], [own]) else "backends never import each other"
    if within(name, "attn_core.kernels"):
        return None if lazily or launcher else "attn_core.kernels is imported inside functions"
    if root == "triton" and launcher:
        return None
    if within(name, "attn_core.conformance"):
        return "backends do not know their judge"
    if root in ("attn_core", "numpy"):
        return None
    if root == "ml_dtypes":
        # JAX and TensorFlow load it; elsewhere it is loaded when NumPy's bfloat16 is met.
        return None if lazily or own in ("tf", "jax") else "ml_dtypes is imported inside functions"
    if own and root in ROOMS[own]:
        # flax is an extra of jax: layers may need it, calls may not.
        layers = module.rpartition(".")[2] in LAYERS
        at_top = root == "flax" and not lazily and not layers
        return "flax is imported inside functions, or in layers" if at_top else None
    if root == "transformers" and ".torch.compat_transformers" in module:
        return None  # its own files, which only its own door opens
    return f"a backend imports attn_core and its own framework, {sorted(ROOMS[own]) if own else []}"


def conformance_objection(module, name, root, lazily):
    if within(name, "attn_core.backends") or within(name, "attn_core.kernels"):
        return "conformance reaches frameworks through the verbs, by name"
    if root in ("attn_core", "numpy", "rich", "typer"):
        return None
    if root in ("ml_dtypes", "safetensors") and lazily:
        return None  # optional, and asked for by name
    if root == "pytest" and module == "attn_core.conformance.plugin":
        return None  # pytest itself imports the plugin
    asked = {"torch", "jax", "flax", "keras"} | PEERS
    if module == "attn_core.conformance.peers" and root in asked:
        # The peers are libraries' own functions; each adapter imports its own when asked.
        return None if lazily else "a peer's library is imported when its adapter is made"
    return "conformance reaches frameworks only through the verbs"


def benchmarks_objection(module, name, root, lazily):
    tables = module in ("attn_core.benchmarks.tune", "attn_core.benchmarks.gpu_calls")
    if lazily and tables and name == "attn_core.kernels.configs":
        return None  # what was measured is written there; which of two ways is timed is said
    if within(name, "attn_core.backends") or within(name, "attn_core.kernels"):
        return "benchmarks reach frameworks through the verbs, by name"
    calls = ".benchmarks." in name and name.split(".")[2].endswith("_calls")
    if calls and not lazily:
        return "a framework's calls are imported when a subject of it is asked"
    if root in ("attn_core", "numpy", "rich"):
        return None
    own = CALLS.get(module.split(".")[-1])
    if root == own:
        return None
    if root in ("onnx", "onnxruntime") and module.endswith(".onnx_calls"):
        return None if lazily else "optional, and asked for by name"
    if root == "keras" and module.endswith(".keras_calls"):
        return None if lazily else "Keras reads its backend once, when it is imported"
    if root == "matplotlib" and lazily:
        return None  # optional: a picture
    return "benchmarks reach a framework only in its own calls"


CALLS = {
    "torch_calls": "torch",
    "gpu_calls": "torch",
    "tf_calls": "tensorflow",
    "jax_calls": "jax",
    "jax_floors": "jax",
}


def test_import_direction():
    broken = []
    for module, path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        for name, lazily, line in imports(tree, module, path.name == "__init__.py"):
            reason = objection(module, name, lazily)
            if reason:
                broken.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {reason}")
    assert not broken, "\n" + "\n".join(broken)


def test_import_direction_by_name():
    """importlib would walk around the rule above, so only two modules may use it."""
    # Subjects: anyone's attention can be judged, and is named as a string.
    allowed = {"attn_core.registry", "attn_core.conformance.subjects"}
    broken = []
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                if called in ("import_module", "__import__") and module not in allowed:
                    broken.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {called}")
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attn_core.api", "import torch"),
        ("attn_core.api", "def f():\n    import attn_core.backends.torch"),
        ("attn_core.api", "from attn_core import backends"),
        ("attn_core.api", "from .backends import numpy"),
        ("attn_core.api", "from attn_core.conformance import run"),
        ("attn_core.api", "import typer"),
        ("attn_core.api", "def f():\n    import safetensors"),
        ("attn_core.model.weights", "import safetensors"),
        ("attn_core.model.build", "def f():\n    import attn_core.backends.torch"),
        ("attn_core", "from attn_core.backends import numpy"),
        ("attn_core.registry", "import attn_core.backends.numpy"),
        ("attn_core.reference", "from attn_core import masks"),
        ("attn_core.backends.torch.reference", "import jax"),
        ("attn_core.backends.torch.reference", "from ..numpy import arrays"),
        ("attn_core.backends.torch.reference", "from attn_core.backends import tf"),
        ("attn_core.backends.torch.triton", "import attn_core.kernels"),
        ("attn_core.backends.torch.triton", "import triton"),
        ("attn_core.backends.torch.chunked", "from attn_core.backends.torch import triton_forward"),
        ("attn_core.backends.jax", "from flax import nnx"),
        ("attn_core.cli_kernels", "from attn_core.kernels import ahead"),
        ("attn_core.explained", "def f():\n    from attn_core.kernels import configs"),
        ("attn_core.backends.keras.compat", "import tensorflow as tf"),
        ("attn_core.backends.keras.compat", "from attn_core.backends.jax import compat"),
        ("attn_core.backends.torch.compat", "import transformers"),
        ("attn_core.compat", "from attn_core.compat import torch"),
        ("attn_core.compat.torch", "import torch"),
        ("attn_core.compat.torch", "from attn_core.backends.jax.compat import f"),
        ("attn_core.compat.conventions", "def f():\n    import attn_core.backends.torch"),
        ("attn_core.api", "from attn_core.compat import conventions"),
        ("attn_core.kernels.forward", "import torch"),
        ("attn_core.kernels.forward", "import numpy as np"),
        ("attn_core.kernels.forward", "from attn_core import spec"),
        ("attn_core.conformance.subjects", "def f():\n    import tensorflow as tf"),
        ("attn_core.conformance.subjects", "def f():\n    import attn_core.backends.tf"),
        ("attn_core.conformance.subjects", "def f():\n    import transformers"),
        ("attn_core.conformance.peers", "import transformers"),
        ("attn_core.api", "def f():\n    from attn_core.benchmarks import runner"),
        ("attn_core.cli_bench", "from attn_core.benchmarks import runner"),
        ("attn_core.conformance.report", "from attn_core.benchmarks import cases"),
        ("attn_core.benchmarks.worker", "def f():\n    import torch"),
        ("attn_core.benchmarks.gpu", "from attn_core.benchmarks import gpu_calls"),
        ("attn_core.benchmarks.gpu", "def f():\n    from attn_core.kernels import configs"),
        ("attn_core.benchmarks.torch_calls", "import jax"),
        ("attn_core.benchmarks.torch_calls", "import attn_core.backends.torch"),
        ("attn_core.benchmarks.onnx_calls", "import onnxruntime"),
        ("attn_core.benchmarks.subjects", "from attn_core.benchmarks import jax_calls"),
    ],
)
def test_import_direction_catches(module, source):
    """The rule itself is tested: each of these must be seen."""
    found = list(imports(ast.parse(source), module, is_package=False))
    assert found
    assert any(objection(module, name, lazily) for name, lazily, _ in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attn_core.api", "import numpy as np\nfrom attn_core.language import text"),
        ("attn_core.registry", "def f():\n    import attn_core.backends.numpy"),
        ("attn_core", "from attn_core import backends"),
        (
            "attn_core.cli_conformance",
            "import typer\ndef f():\n    from attn_core.conformance import x",
        ),
        ("attn_core.backends.tf.layers", "import keras\nfrom attn_core import spec"),
        ("attn_core.backends.jax.layers", "from flax import nnx"),
        ("attn_core.backends.jax.layers", "from . import arrays"),
        ("attn_core.backends.torch.triton", "def f():\n    import attn_core.kernels"),
        (
            "attn_core.backends.torch.triton_forward",
            "import triton\nfrom attn_core.backends.torch import triton_call",
        ),
        ("attn_core", "from attn_core import compat"),
        ("attn_core.backends.jax.compat", "from attn_core.compat.conventions import f"),
        ("attn_core.backends.keras.compat", "import keras"),
        ("attn_core.backends.torch.compat_transformers", "import transformers"),
        ("attn_core.backends.torch.compat_transformers_masks", "import transformers"),
        ("attn_core.compat", "def f():\n    import attn_core.compat.torch as door"),
        ("attn_core.compat.flax", "from attn_core.backends.jax.compat_flax import f"),
        ("attn_core.kernels.forward", "import triton.language as tl"),
        ("attn_core.kernels.interpreter_bfloat16", "import numpy as np"),
        ("attn_core.cli_kernels", "def f():\n    from attn_core.kernels import ahead"),
        ("attn_core.conformance.peers", "def f():\n    from transformers import masking_utils"),
        ("attn_core.cli_bench", "def f():\n    from attn_core.benchmarks import runner"),
        ("attn_core.benchmarks.check", "from attn_core.conformance import tolerance"),
        ("attn_core.benchmarks.tf_calls", "import tensorflow as tf"),
        (
            "attn_core.benchmarks.subjects",
            "def f():\n    from attn_core.benchmarks import tf_calls",
        ),
    ],
)
def test_import_direction_allows(module, source):
    for name, lazily, _ in imports(ast.parse(source), module, is_package=False):
        assert objection(module, name, lazily) is None


def test_completion_offers_what_is_public_and_no_more():
    import attn_core

    assert set(dir(attn_core)) == {*attn_core.__all__, "__version__", "conformance"}
    assert all(hasattr(attn_core, name) for name in dir(attn_core))
    for module in (attn_core.masks, attn_core.scores):
        assert dir(module) == sorted(module.__all__)
    compat = importlib.import_module("attn_core.compat")
    assert set(dir(compat)) == {*compat.__all__, *compat.DOORS}


@pytest.mark.parametrize("room", ["torch", "tf", "jax", "keras"])
def test_layers_that_are_loaded_late_are_typed_and_completed(room):
    """Editors read imports under TYPE_CHECKING; interpreters ask `__dir__`."""
    tree = ast.parse((PACKAGES["attn_core.backends"] / room / "__init__.py").read_text("utf-8"))
    typed = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for one in node.body
        for alias in one.names
    }
    assert typed == {"AdditiveAttention", "MultiHeadAttention", "Transformer"} | (
        {"Steps"} if room == "keras" else set()
    )
    assert any(isinstance(node, ast.FunctionDef) and node.name == "__dir__" for node in tree.body)
