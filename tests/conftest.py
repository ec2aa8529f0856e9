"""Fewer walks of the garbage collector, in the tests of every folder.

A framework is a million objects that live to the end, and tracing makes many more. Walked each time
that 700 are new, they would take a good part of a test that compiles. What tests look at is freed
by its count, or after a `gc.collect()` of their own.
"""

import gc


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
