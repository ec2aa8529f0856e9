"""Print XLA's flags for code that is compiled quickly and runs slowly, those that XLA knows here.

A test compiles hundreds of small problems and runs each once, so the time goes to the compiler. The
flags leave out optimisations, the generator of code for fused loops (a third of the work of a
compilation with it) and the cutting up of a program into parts for as many threads (a sixth of what
is left, where each core has a test of its own), and nothing that decides what is computed. XLA ends
a process in which it meets a flag that it does not know, and flags come and go with its versions,
which JAX and TensorFlow have each their own of: so each flag is tried with each of them, in a
process of its own.

    XLA_FLAGS="$(python tools/plain_code.py)" pytest tests/jax_only
"""

import os
import subprocess
import sys
from importlib.util import find_spec

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
COMPILES = {
    "jax": "import jax; jax.jit(lambda x: x + 1)(1.0)",
    "tensorflow": "import tensorflow as tf; "
    "tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1.0))",
}


def known(flags: tuple[str, ...]) -> bool:
    """Whether everything here that holds XLA compiles with these flags."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    commands = [[sys.executable, "-c", COMPILES[name]] for name in COMPILES if find_spec(name)]
    return all(
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
        for command in commands
    )


def main() -> int:
    found = FLAGS if known(FLAGS) else tuple(flag for flag in FLAGS if known((flag,)))
    print(" ".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
