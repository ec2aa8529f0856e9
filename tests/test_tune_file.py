"""What `attn-core bench tune` does with the user's table: it adds to what can be read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_machine import Machine
from typer.testing import CliRunner

from attn_core.benchmarks import gpu, tune
from attn_core.cli import app
from attn_core.kernels import configs
from attn_core.kernels.configs import Config, Entry

GOOD = (
    '{ kernel = "forward", on = ["sm_90"], rows = 128, keys = 64, warps = 8, stages = 2, '
    'source = "mine" }'
)
TYPO = GOOD.replace("forward", "forwrd")
WORD = GOOD.replace('["sm_90"]', '"sm_90"')
WON = Entry("d_query", ("sm_90",), (64,), 16, ("none",), Config(64, 64, 4, 2), "measured", "yours")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "kernels.toml"
    monkeypatch.setenv(configs.VARIABLE, str(path))
    configs.forget()
    yield path
    configs.forget()


class Untouched(Machine):
    """Nothing may be measured on it."""

    def facts(self) -> dict[str, Any]:
        raise AssertionError("something is measured")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"entries = [{GOOD}, {TYPO}]", "entry 2 of 2: `kernel` must be one of "),
        (f"entries = [{GOOD}, {TYPO}]", "Got 'forwrd'."),
        (f"entries = [{WORD}]", "`on` must be a list of str. Got"),
        (f"entries = [{GOOD.replace('rows', 'widths = 64, rows')}]", "`widths` must be a list of"),
        (f"entries = [{GOOD.replace('rows', 'bits = 8, rows')}]", "`bits` must be 16 or 32"),
        (f"entries = {GOOD}", "`entries` must be a list"),
        (f"entry = [{GOOD}]", "`entries` must be a list, and all that there is. Got entry."),
        (f"entries = [{GOOD},", "must hold kernel configurations as `attn-core bench tune` writes"),
    ],
)
def test_a_table_that_cannot_be_read_whole_is_not_written_over(
    place: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setattr(gpu, "device", Untouched)
    place.write_text(text, "utf-8")
    run = CliRunner().invoke(app, ["bench", "tune"])
    assert run.exit_code == 2
    assert run.output.startswith(f"attn-core: {place} must hold kernel configurations")
    assert said in run.output
    assert "or measure without writing, with --dry." in run.output
    # Nor where somebody has broken it since.
    with pytest.raises(gpu.Unreadable, match="with --dry"):
        tune.keep([WON])
    assert place.read_text("utf-8") == text


def test_without_writing_it_is_measured_beside_such_a_table(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "device", Untouched)
    place.write_text(f"entries = [{TYPO}]", "utf-8")
    run = CliRunner().invoke(app, ["bench", "tune", "--dry"])
    assert isinstance(run.exception, AssertionError)
    assert place.read_text("utf-8") == f"entries = [{TYPO}]"


def test_what_was_added_to_it_meanwhile_stays(place: Path) -> None:
    assert configs.yours() == ()
    place.write_text(f"entries = [{GOOD}]", "utf-8")
    tune.keep([WON])
    assert [entry.source for entry in configs.yours()] == ["measured", "mine"]
