"""The flag: who wins, for how long, in which thread; and frameworks that are missing or broken."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import attn_core
from attn_core import config, registry
from attn_core.spec import AttentionOutput

X = np.ones((1, 1, 2, 2), "float32")


class Fake:
    """A backend that answers with its own name and the implementation that was chosen."""

    IMPLEMENTATIONS = ("native", "chunked", "reference")

    def __init__(self, name):
        self.NAME = name

    def owns(self, x):
        return False

    def tracing(self):
        return False

    def ranked(self, problem):
        return self.IMPLEMENTATIONS

    def refusals(self, problem, impl):
        return [] if impl in self.IMPLEMENTATIONS else [f"`impl` must be known. Got {impl}."]

    def attend(self, plan, operands):
        return AttentionOutput((self.NAME, plan.impl))


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Nobody has said anything, and every backend is a fake one."""
    for variable in ("ATTN_CORE_BACKEND", "ATTN_CORE_IMPL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(config, "_process", {"backend": None, "impl": None})
    monkeypatch.setattr(registry, "_loaded", {})
    fakes = {name: Fake(name) for name in config.BACKENDS}
    monkeypatch.setattr(registry, "_LOADERS", {name: lambda n=name: fakes[n] for name in fakes})
    registry._cached.cache_clear()
    yield
    registry._cached.cache_clear()
    assert [getattr(config._thread, setting, None) for setting in config.SETTINGS] == [None, None]


def answers(**options):
    """(backend, implementation) that answers for NumPy arrays now."""
    return attn_core.attention(X, X, X, **options)


# Precedence ------------------------------------------------------------------------------------


def test_nothing_configured_means_numpy():
    assert answers() == ("numpy", "native")
    assert config.get("backend") is None
    assert config.get("impl") is None


def test_every_later_word_wins_over_the_ones_before(monkeypatch):
    monkeypatch.setenv("ATTN_CORE_BACKEND", "torch")
    monkeypatch.setenv("ATTN_CORE_IMPL", "reference")
    assert answers() == ("torch", "reference")
    config.set(backend="tf", impl="chunked")
    assert answers() == ("tf", "chunked")
    with attn_core.use(backend="jax", impl="native"):
        assert answers() == ("jax", "native")
        assert answers(impl="reference") == ("jax", "reference")
        assert answers(impl="auto") == ("jax", "native")
    assert answers() == ("tf", "chunked")
    assert answers(impl="native") == ("tf", "native")
    config.set(impl=None)
    assert answers() == ("tf", "reference")
    config.set(backend=None)
    assert answers() == ("torch", "reference")
    monkeypatch.delenv("ATTN_CORE_BACKEND")
    monkeypatch.delenv("ATTN_CORE_IMPL")
    assert answers() == ("numpy", "native")


def test_backend_and_impl_are_looked_up_apart(monkeypatch):
    monkeypatch.setenv("ATTN_CORE_IMPL", "reference")
    config.set(backend="tf")
    with attn_core.use(impl="chunked"):
        assert answers() == ("tf", "chunked")
    assert answers() == ("tf", "reference")
    with attn_core.use(backend="jax"):
        assert answers() == ("jax", "reference")


def test_auto_is_a_word_too():
    config.set(impl="reference")
    with attn_core.use(impl="auto"):
        assert answers() == ("numpy", "native")
    assert answers() == ("numpy", "reference")


def test_an_empty_variable_says_nothing(monkeypatch):
    monkeypatch.setenv("ATTN_CORE_BACKEND", "")
    monkeypatch.setenv("ATTN_CORE_IMPL", "")
    assert answers() == ("numpy", "native")


def test_a_wrong_word_of_the_environment_is_told_where_it_stands(monkeypatch):
    monkeypatch.setenv("ATTN_CORE_IMPL", "chunky")
    with pytest.raises(ValueError, match=r"^ATTN_CORE_IMPL of the environment: `impl` must"):
        config.get("impl")


def test_the_environment_is_read_when_it_is_needed(monkeypatch):
    assert answers() == ("numpy", "native")
    monkeypatch.setenv("ATTN_CORE_BACKEND", "jax")
    assert answers() == ("jax", "native")


def test_switching_back_and_forth_in_one_process():
    seen = []
    for name in (*config.BACKENDS, *reversed(config.BACKENDS)):
        with attn_core.use(backend=name):
            seen.append(answers()[0])
    assert seen == [*config.BACKENDS, *reversed(config.BACKENDS)]


def test_a_backend_is_loaded_when_it_is_first_named():
    with attn_core.use(backend="jax"):
        assert registry._loaded == {}
        answers()
    assert set(registry._loaded) == {"jax"}


# use -------------------------------------------------------------------------------------------


def test_use_nests_and_restores():
    with attn_core.use(backend="torch", impl="chunked"):
        with attn_core.use(backend="jax"):
            assert answers() == ("jax", "chunked")
            with attn_core.use(impl="reference"):
                assert answers() == ("jax", "reference")
            with attn_core.use():
                assert answers() == ("jax", "chunked")
        assert answers() == ("torch", "chunked")
    assert answers() == ("numpy", "native")


def test_coroutines_that_close_in_another_order_leave_nothing_behind():
    """The flag is the thread's, so they see each other's; afterwards nobody's is left."""

    def waiting(**names):
        with attn_core.use(**names):
            yield answers()

    one, other = waiting(backend="torch", impl="chunked"), waiting(backend="jax")
    assert next(one) == ("torch", "chunked")
    assert next(other) == ("jax", "chunked")
    one.close()
    assert answers() == ("jax", "native")
    other.close()
    assert answers() == ("numpy", "native")


def test_use_restores_after_an_exception():
    class Oops(Exception):
        pass

    def fail():
        with attn_core.use(backend="jax", impl="reference"):
            raise Oops

    for _ in range(2):
        with pytest.raises(Oops):
            fail()
        assert answers() == ("numpy", "native")


@pytest.mark.parametrize(
    "wrong", [{"backend": "jax", "impl": "x"}, {"backend": "x", "impl": "auto"}]
)
def test_use_that_is_refused_changes_nothing(wrong):
    with pytest.raises(ValueError, match="must be one of"), attn_core.use(**wrong):
        pytest.fail("entered")
    assert answers() == ("numpy", "native")
    with attn_core.use(backend="tf"):
        with pytest.raises(ValueError, match="must be one of"), attn_core.use(**wrong):
            pytest.fail("entered")
        assert answers() == ("tf", "native")


def test_use_holds_in_its_own_thread_only():
    found, entered, leave = {}, threading.Event(), threading.Event()

    def other():
        found["before"] = answers()
        with attn_core.use(backend="torch"):
            entered.set()
            leave.wait(10)
            found["inside"] = answers()
        found["after"] = answers()

    with attn_core.use(backend="jax"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        assert answers() == ("jax", "native")
        leave.set()
        thread.join()
        assert answers() == ("jax", "native")
    assert found["before"] == ("numpy", "native")
    assert found["inside"] == ("torch", "native")
    assert found["after"] == ("numpy", "native")


def test_set_holds_in_every_thread():
    found = []
    config.set(backend="tf")
    thread = threading.Thread(target=lambda: found.append(answers()))
    thread.start()
    thread.join()
    assert found == [("tf", "native")]


def test_use_works_as_a_decorator():
    assert attn_core.use(backend="jax")(answers)() == ("jax", "native")
    assert answers() == ("numpy", "native")


# set and load ----------------------------------------------------------------------------------


def test_set_leaves_alone_what_it_is_not_given():
    config.set(backend="tf")
    config.set(impl="reference")
    config.set()
    config.load({"impl": "chunked"})
    assert answers() == ("tf", "chunked")


def test_set_clears_with_none():
    config.set(backend="tf", impl="reference")
    config.set(backend=None, impl="reference")
    assert answers() == ("numpy", "reference")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", 'backend = "jax"\nimpl = "chunked"\n'),
        ("a.toml", '[attn_core]\nbackend = "jax"\nimpl = "chunked"\n'),
        ("a.toml", '[other]\nx = 1\n[attn_core]\nbackend = "jax"\nimpl = "chunked"\n'),
        ("a.yaml", "backend: jax\nimpl: chunked\n"),
        ("a.yml", "attn_core:\n  backend: jax\n  impl: chunked\n"),
        ("a.yml", "x: &x {backend: tf}\nattn_core: {<<: *x, backend: jax, impl: chunked}"),
        ("a.json", '{"attn_core": {"backend": "jax", "impl": "chunked"}}'),
    ],
)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_load_from_a_file(name, content, kind, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    config.load(kind(path))
    assert answers() == ("jax", "chunked")


@pytest.mark.parametrize(
    "mapping",
    [
        {"backend": "jax", "impl": "chunked"},
        {"attn_core": {"backend": "jax", "impl": "chunked"}},
        SimpleNamespace(backend="jax", impl="chunked").__dict__,
    ],
)
def test_load_from_a_mapping(mapping):
    before = str(mapping)
    config.load(mapping)
    assert answers() == ("jax", "chunked")
    assert str(mapping) == before


LOADS = {
    "unknown key": (
        {"backnd": "jax"},
        "must hold only backend and impl. Got 'backnd'. Did you mean 'backend'?",
    ),
    "unlike any key": ({"device": "cuda"}, "Got 'device'."),
    "key in the table": ({"attn_core": {"implementation": "x"}}, "Got 'implementation'"),
    "keys in two places": ({"attn_core": {}, "backend": "jax"}, "in one place. Got 'backend'"),
    "unknown backend": ({"backend": "troch"}, "Did you mean 'torch'?"),
    "unknown impl": ({"impl": "refrence"}, "Did you mean 'reference'?"),
    "impl is bad after a good backend": ({"backend": "jax", "impl": "x"}, "`impl` must be one of"),
    "number": ({"backend": 3}, "`backend` must be one of"),
    "list": ({"backend": ["jax"]}, "`backend` must be one of"),
    "table is a word": ({"attn_core": "jax"}, "`attn_core` of a config must be a mapping. Got str"),
    "table is empty": ({"attn_core": None}, "must be a mapping. Got NoneType"),
}


@pytest.mark.parametrize("name", LOADS)
def test_load_refuses_and_changes_nothing(name):
    mapping, words = LOADS[name]
    config.set(backend="tf", impl="reference")
    with pytest.raises(ValueError) as caught:
        config.load(mapping)
    assert words in str(caught.value)
    assert answers() == ("tf", "reference")


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        (
            "a.ini",
            "{}",
            ValueError,
            "must be a .toml, .yaml, .yml or .json file or a mapping. Got a.ini",
        ),
        ("a.yaml", "- jax\n", ValueError, "must be a mapping. Got list"),
        ("a.yaml", "backend: [", ValueError, "a.yaml must be complete YAML: "),
        ("a.toml", "backend = ", ValueError, "a.toml must be complete TOML: "),
        ("a.json", "{", ValueError, "a.json must be complete JSON: "),
        ("a.yaml", "", ValueError, "must be a mapping. Got NoneType"),
        ("a.toml", "backend = \n", ValueError, "Invalid value"),
        ("a.toml", 'backend = "jaxx"', ValueError, "Did you mean 'jax'?"),
        ("a.yaml", "backend: jax\nbackend: tf\n", ValueError, "Got 'backend' twice"),
        ("a.yaml", "attn_core: {impl: auto, impl: auto}", ValueError, "Got 'impl' twice"),
        ("a.json", '{"backend": "jax", "backend": "tf"}', ValueError, "Got 'backend' twice"),
    ],
)
def test_files_that_are_refused(name, content, error, words, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(error) as caught:
        config.load(path)
    assert words in str(caught.value)
    assert answers() == ("numpy", "native")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        config.load(tmp_path / "none.toml")


# Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("pytorch", "torch"),
        ("Torch", "torch"),
        ("jaxx", "jax"),
        ("tensorflow", "tf"),
        ("keras", "tf"),
        ("nunpy", "numpy"),
        ("flax", "jax"),
    ],
)
def test_an_unknown_backend_is_told_the_nearest_name_and_what_is_installed(
    wrong, near, monkeypatch
):
    words = f"`backend` must be one of numpy, torch, tf, jax (installed: {config.installed()}). "
    words += f"Got {wrong!r}. Did you mean {near!r}?"
    assert "numpy" in config.installed()
    for ask in (
        lambda: config.set(backend=wrong),
        lambda: attn_core.use(backend=wrong).__enter__(),
        lambda: registry.load(wrong),
        lambda: (monkeypatch.setenv("ATTN_CORE_BACKEND", wrong), answers()),
    ):
        with pytest.raises(ValueError) as caught:
            ask()
        assert words in str(caught.value)


@pytest.mark.parametrize("wrong", ["cuda", "", 3, None.__class__])
def test_a_backend_unlike_any_is_told_no_name(wrong):
    with pytest.raises(ValueError, match=r"must be one of numpy, torch, tf, jax .*Got [^.]*\.$"):
        config.set(backend=wrong)


@pytest.mark.parametrize(
    ("variable", "wrong"),
    [("BACKEND", "reference"), ("BACKEND", "auto"), ("IMPL", "torch"), ("IMPL", "Reference")],
)
def test_a_name_of_the_other_kind_in_the_environment(variable, wrong, monkeypatch):
    monkeypatch.setenv(f"ATTN_CORE_{variable}", wrong)
    with pytest.raises(ValueError, match=f"`{variable.lower()}` must be one of .* Got '{wrong}'"):
        answers()


def test_an_unknown_impl_is_told_the_nearest_name():
    with pytest.raises(ValueError, match=r"`impl` must be one of auto, .*Did you mean 'triton'"):
        config.set(impl="tritn")


# Refusals --------------------------------------------------------------------------------------


def test_a_refusal_lists_every_candidate_and_every_reason(monkeypatch):
    class Refusing(Fake):
        def refusals(self, problem, impl):
            return {"native": ["no sinks.", "no D = 2."], "chunked": [], "reference": ["slow."]}[
                impl
            ]

    backend = Refusing("numpy")
    monkeypatch.setitem(registry._loaded, "numpy", backend)
    assert answers() == ("numpy", "chunked")
    with pytest.raises(attn_core.UnsupportedError) as caught:
        answers(impl="native")
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        "  native: no sinks.",
        "  native: no D = 2.",
        "  chunked: would answer",
        "  reference: slow.",
    ]
    assert isinstance(caught.value, NotImplementedError)
    monkeypatch.setattr(backend, "refusals", lambda problem, impl: [f"not {impl}."])
    registry._cached.cache_clear()
    with pytest.raises(attn_core.UnsupportedError) as caught:
        answers()
    assert str(caught.value).splitlines()[1:] == [
        "  native: not native.",
        "  chunked: not chunked.",
        "  reference: not reference.",
    ]


# Frameworks that are missing or broken: a process of its own, since an import is for good -------

MODULE = {"torch": "torch", "tf": "tensorflow", "jax": "jax"}


def run(code, tmp_path):
    code = "import numpy as np, sys\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = """
import attn_core
x = np.ones((1, 1, 2, 2), "float32")
try:
    with attn_core.use(backend={backend!r}):
        attn_core.attention(x, x, x)
except Exception as error:
    print(type(error).__name__, "|", error, "|", type(error.__cause__).__name__, error.__cause__)
assert attn_core.attention(x, x, x).shape == x.shape    # the others still work
"""


@pytest.mark.parametrize("backend", MODULE)
def test_a_missing_framework_names_the_extra(backend, tmp_path):
    module = MODULE[backend]
    hidden = f"""
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == {module!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, Hidden())
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda n, p=None: None if n == {module!r} else find(n, p)
    """
    out = run(textwrap.dedent(hidden) + ASK.format(backend=backend), tmp_path)
    assert out.startswith("ImportError | ")
    assert f"backend {backend!r} needs {module}, which is not installed" in out
    assert f"pip install 'attn-core[{backend}]'" in out
    assert "Installed: numpy" in out
    assert backend not in out.split("Installed: ")[1].split("|")[0]
    assert "ModuleNotFoundError" in out.split("|")[2]


@pytest.mark.parametrize("backend", MODULE)
@pytest.mark.parametrize(
    "failure",
    [
        "raise ImportError('libfake.so: undefined symbol')",
        "import a_module_that_is_not_there",
        "raise OSError('libcudart.so.99: cannot open')",
        "raise RuntimeError('compiled against another NumPy')",
    ],
)
def test_a_broken_framework_keeps_its_own_error(backend, failure, tmp_path):
    (tmp_path / f"{MODULE[backend]}.py").write_text(failure)
    out = run("sys.path.insert(0, '.')" + ASK.format(backend=backend), tmp_path)
    what, message, cause = out.split(" | ")
    assert what == "ImportError"
    assert f"backend {backend!r} found {MODULE[backend]}, but importing it failed" in message
    own = failure.split("'")[1] if "'" in failure else "a_module_that_is_not_there"
    assert own in message
    assert own in cause


def test_the_flag_through_the_environment_of_a_process(tmp_path):
    code = """
    import os
    os.environ["ATTN_CORE_BACKEND"] = "trch"
    import attn_core
    x = np.ones((1, 1, 2, 2), "float32")
    try:
        attn_core.attention(x, x, x)
    except ValueError as error:
        print(error)
    os.environ["ATTN_CORE_BACKEND"] = "numpy"
    assert attn_core.attention(x, x, x).shape == x.shape
    """
    out = run(code, tmp_path)
    assert "Did you mean 'torch'?" in out
    assert "(installed: numpy" in out
