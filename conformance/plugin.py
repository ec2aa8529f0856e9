"""The pytest plugin: `pytest --attn-subject package.module:function` adds one test to a case.

    pytest --attn-subject my_attention:mine --attn-tier smoke
    pytest --attn-subject jax --attn-form jit -n 2 -k mask-

The tests are named attn::<subject>::<form>::<case>. What the subject does not offer is skipped with
that reason. They run in pytest's own process, so give each framework a run of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest


class ConformanceError(AssertionError):
    """A case that did not pass; the text says by how much, where and why."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn-core", "conformance of an attention")
    group.addoption(
        "--attn-subject",
        action="append",
        default=[],
        help="a backend, a peer (torch-sdpa, ...), or package.module:function",
    )
    group.addoption("--attn-tier", default="smoke", help="smoke, full or exhaustive")
    group.addoption("--attn-form", default="eager", help="eager, jit, aot_eager, ...")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    specs = config.getoption("--attn-subject")
    if not specs:
        return
    from attn_core.conformance import subjects
    from attn_core.conformance.runner import plan

    # A stranger's module stands where the command was typed.
    sys.path.append(str(config.invocation_params.dir))
    form = config.getoption("--attn-form")
    try:
        work = plan(specs, [form], tier=config.getoption("--attn-tier"))
        for spec in specs:
            subjects.find(spec)
    except (ValueError, TypeError, ImportError) as error:
        raise pytest.UsageError(str(error)) from error
    for spec, form, names in work:
        for name in names:
            item = CaseItem.from_parent(session, name=name, nodeid=f"attn::{spec}::{form}::{name}")
            item.asked = (spec, form)
            items.append(item)


class CaseItem(pytest.Item):
    """One case, put to one subject in one form."""

    asked: tuple[str, str]

    def runtest(self) -> None:
        from attn_core import registry
        from attn_core.conformance import subjects
        from attn_core.conformance.judgement import judge

        spec, form = self.asked
        subject = subjects.find(spec)
        verdict = judge(self.name, subject, registry.load(subject.framework), form)
        if verdict.missing:
            pytest.skip(f"not offered: {verdict.missing}")
        if not verdict.passed:
            raise ConformanceError(_words(verdict))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, ConformanceError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.nodeid


def _words(verdict: Any) -> str:
    lines = [verdict.problem] if verdict.problem else []
    for what, used in verdict.shares.items():
        if not used <= 1:
            where = verdict.where.get(what)
            lines.append(f"{what}: {used:.3g} of what is allowed, first at {where}")
    if verdict.cause:
        lines.append(f"looks like: {verdict.cause}")
    return "\n".join(lines)
