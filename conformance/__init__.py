"""The conformance suite: does an attention mean what docs/SPEC.md says?

from attn_core import conformance
verdicts = conformance.run(["torch", "jax"], forms=["eager", "jit"])

cases       the questions, each beside an answer written apart from it
plain       the textbook computation that errors are measured by
tolerance   how much error is allowed, one table
judgement   one case, one backend, one form
run         all of them, each subject in processes of its own
report      the matrix
"""

if __name__ == "conformance":
    raise ImportError(
        "`conformance` must be imported as attn_core.conformance. Got a bare import of "
        "`conformance`; install the package (pip install -e .) instead of putting its source "
        "folder on sys.path."
    )

from attn_core.conformance.judgement import Verdict
from attn_core.conformance.runner import run
from attn_core.conformance.subjects import Subject, subject

__all__ = ["Subject", "Verdict", "run", "subject"]
