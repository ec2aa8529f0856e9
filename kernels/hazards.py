"""Known faults of the compilers below Triton: found by their versions, and named.

ptxas before CUDA 13.3 can corrupt a Hopper product (wgmma) whose first operand stands in registers,
and that is what P V of an attention kernel is (Triton issue 11781; 12.8, which Triton 3.6 brings
along, has given wrong results elsewhere). Triton takes another ptxas where TRITON_PTXAS_PATH names
one.
"""

from __future__ import annotations

import subprocess
from typing import NamedTuple

MENDED = (13, 3)
"""The CUDA release whose ptxas is right."""

_AFFECTED = ("sm_90",)


class Assembler(NamedTuple):
    """The ptxas that Triton uses for an architecture.

    Attributes:
        version: of its CUDA release; None where it does not say.
        trouble: why it cannot be asked, or "".
    """

    path: str
    version: tuple[int, int] | None
    trouble: str = ""


def assembler(architecture: str) -> Assembler:
    """The ptxas for "sm_NN", as Triton finds it: TRITON_PTXAS_PATH is honoured."""
    from triton import knobs

    blackwell = int(architecture.removeprefix("sm_")) >= 100
    # Older releases of Triton have one for all.
    tool = "ptxas_blackwell" if blackwell and hasattr(knobs.nvidia, "ptxas_blackwell") else "ptxas"
    try:
        found = getattr(knobs.nvidia, tool)
        major, minor = str(found.version).split(".")[:2]
        return Assembler(str(found.path), (int(major), int(minor)))
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        return Assembler("", None, f"{type(error).__name__}: {error}")


def hazard(architecture: str) -> str | None:
    """What may go wrong with kernels for this GPU, and what mends it; None where nothing is known.

    Args:
        architecture: "sm_90", "gfx942", ...
    """
    if architecture not in _AFFECTED:
        return None
    found = assembler(architecture)
    if found.version is None:
        return f"Triton finds no ptxas that it can ask for its version: {found.trouble}"
    if found.version >= MENDED:
        return None
    said, mended = (".".join(map(str, version)) for version in (found.version, MENDED))
    return (
        f"ptxas of CUDA {said} ({found.path}) can corrupt products whose first operand stands in "
        f"registers (wgmma), as P V does; CUDA {mended} mends it. Set TRITON_PTXAS_PATH to a ptxas "
        f"of CUDA {mended} or later (pip install 'nvidia-cuda-nvcc>={mended}')."
    )
