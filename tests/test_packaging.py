"""The package on disk, in the table, in the wheel, and under its own name only."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import attn_core
from attn_core import cli_doctor

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]  # package -> folder, for the top-level folders
NOT_SHIPPED = {"tests", "examples", "docs", "tools", "build", "dist"}


def folder_of(package):
    """Where a package of the table lives, as setuptools looks it up: the nearest listed parent."""
    head, tail = package, []
    while head not in FOLDERS:
        head, _, last = head.rpartition(".")
        tail.insert(0, last)
    return Path(FOLDERS[head], *tail)


def source_files():
    """Every Python file that must ship, as a path relative to the root."""
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            yield path.relative_to(ROOT)


def test_every_folder_with_code_is_in_the_package_table():
    on_disk = {path.parent for path in source_files()}
    in_table = {folder_of(package) for package in SETUPTOOLS["packages"]}
    assert on_disk == in_table


def test_every_top_level_folder_is_shipped_or_known_not_to_be():
    with_code = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(path.rglob("*.py"))
    }
    assert with_code - NOT_SHIPPED == set(FOLDERS.values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy, so that no stale build/lib can slip into it."""
    where = tmp_path_factory.mktemp("wheel")
    source = where / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pyc*"))
    # --skip-dependency-check: that it builds with the setuptools at hand is what we want to see.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command += ["--skip-dependency-check", "--outdir", str(where), str(source)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (built,) = where.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheels_only_top_level_name_is_attn_core(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    (information,) = [name for name in top if name.endswith(".dist-info")]
    assert top == {"attn_core", information}
    assert wheel.read(f"{information}/top_level.txt").decode().split() == ["attn_core"]


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel):
    expected = {
        "/".join([*package.split("."), path.relative_to(ROOT / folder_of(package)).as_posix()])
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / folder_of(package)).glob(pattern)
    }
    assert "attn_core/py.typed" in expected
    for package in SETUPTOOLS["packages"]:
        for path in (ROOT / folder_of(package)).glob("*.py"):
            expected.add("/".join([*package.split("."), path.name]))
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected


def test_the_wheel_is_pure_and_needs_no_framework(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", wheel.read(name).decode(), re.M)
    assert set(needed) == {"numpy", "ml_dtypes", "typer", "rich"}
    assert wheel.filename is not None
    assert wheel.filename.endswith("-py3-none-any.whl")


def test_versions_agree(wheel):
    version = PROJECT["project"]["version"]
    assert attn_core.__version__ == version
    assert importlib.metadata.version("attn-core") == version
    assert Path(wheel.filename or "").name.startswith(f"attn_core-{version}-")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert newest is not None
    assert newest[1] == version


@pytest.mark.parametrize("name", sorted(set(FOLDERS.values()) - {"attn_core"}))
def test_bare_imports_raise(name):
    """With the source root on sys.path, as under `python -m pytest`, the folder is importable."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert f"`{name}` must be imported as attn_core.{name}. Got a bare import" in run.stderr
    assert ("transformers asks for another package" in run.stderr) == (name == "kernels")


def test_the_lower_bounds_are_the_versions_of_make_oldest():
    """What pyproject.toml and the README promise is what somebody can run."""
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [line for name in ("torch", "tf", "tf-cpu", "jax") for line in extras[name]]
    bounds = dict(line.split(">=") for line in asked)
    assert bounds.pop("tensorflow") == bounds["tensorflow-cpu"]
    assert pins.pop("jaxlib") == pins["jax"]
    assert pins.keys() == bounds.keys()
    readme = (ROOT / "README.md").read_text("utf-8")
    for name, bound in bounds.items():
        assert f"{pins[name]}.".startswith(f"{bound}."), name
        assert f"{bound} and newer" in readme or f"{name.title()} {bound}" in readme, name


def test_doctor_names_what_is_older_than_a_lower_bound(monkeypatch):
    here = {"torch": "2.9.1+cpu", "tensorflow": "2.16.1", "jax": "0.12.0.1", "triton": "3.4.0"}
    monkeypatch.setattr(cli_doctor, "_version", here.get)
    torch, triton = cli_doctor._old()
    assert "torch 2.9.1+cpu is older than 2.10" in torch
    assert "triton 3.4.0 is older than 3.6" in triton


def test_doctor_asks_no_user_for_what_developers_need(monkeypatch):
    lines = cli_doctor.requires("attn-core")
    lines += ['onnx>=1.9; extra == "bench"', "pyyaml>=6.1; extra == 'yaml'"]
    monkeypatch.setattr(cli_doctor, "requires", lambda name: lines)
    monkeypatch.setattr(cli_doctor, "_version", lambda name: "0.0.1")
    found = {line.split()[0] for line in cli_doctor._old()}
    frameworks = {"torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "flax", "triton"}
    assert found == {"numpy", "pyyaml", "transformers", *frameworks}


def test_every_constraint_is_a_dependency_and_exact():
    """A line that nothing asks for would only seem to be tested."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    names = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    asked = {re.split(r"[^\w-]", line)[0].lower() for line in wanted}
    # jaxlib comes with jax, but not at one version only.
    assert {name for name in names if name.lower() not in asked} == {"jaxlib"}
