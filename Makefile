# Each target works as the first command in a fresh clone: it makes .venv where there is none.
#
#   make demo          the same attention, on the same data, through every framework
#   make test          the tests, and the conformance suite
#   make test-slow     at full size what faster tests prove small
#   make check         format, lint, types, who may import whom; edits nothing
#   make fmt           format and fix what can be fixed
#   make conformance   the conformance suite alone, eager; make test runs its compiled forms too
#   make oldest        its smoke tier on the oldest versions that are supported
#   make bench         check, then time: hours on a quiet machine; then docs/BENCHMARKS.md
#   make gpu           on a CUDA device: judge the kernels, then time them; then docs/GPU.md
#                      MINUTES=14: what tells most, in that time
#   make docs          the doctests of docs/
#   make wheel         a wheel in dist/
#   make clean         remove what was built; .venv stays
#
# PYTHON=python3.12          which Python makes the environment
# FRAMEWORKS="torch jax"     which frameworks are installed and tested; none is allowed
# JOBS=4                     test processes at a time
# VENV=path                  where the environment lives

SHELL := /bin/bash
PYTHON ?= python3
FRAMEWORKS ?= torch tf jax
JOBS ?= auto
VENV ?= .venv

BIN := $(VENV)/bin
comma := ,
empty :=
space := $(empty) $(empty)

# tf-cpu, not tf: the tests run on TensorFlow's wheel without CUDA. The peers are torch's.
extras_torch := torch triton peers
extras_tf := tf-cpu
extras_jax := jax
EXTRAS := dev viz yaml $(foreach name,$(FRAMEWORKS),$(or $(extras_$(name)),$(error \
	FRAMEWORKS must hold torch, tf or jax. Got $(name))))
STAMP := $(VENV)/.installed$(subst $(space),,$(foreach name,$(sort $(FRAMEWORKS)),-$(name)))

RESULTS := benchmarks/results/cpu.json
TIMED := $(VENV)/.timed
SUBJECTS := --backend numpy $(addprefix --backend ,$(FRAMEWORKS))
# Asked for apart: a case asks for the weights too, and those a framework's own kernel never has.
NATIVE := $(patsubst %,--subject %:native,$(filter torch jax,$(FRAMEWORKS)))

COMPILED := aot_eager inductor function dynamic xla jit

# XLA spends most of a small problem's time on making machine code that is run once, and tests make
# it of hundreds: code that is made quickly does for them. The flags are in this file. As XLA makes
# it where nobody asks for haste, JAX is judged on what has most in it (SHIPPED), and by `make
# conformance` on everything.
PLAIN := $(VENV)/.plain-code
PLAIN_CODE := $$(cat $(PLAIN))
SHIPPED := $(addprefix --case=,everything tiles model poison)

# Kernels are compiled for GPUs that are not there, as far as they have changed since this was
# written: all of it takes five minutes, and none of it seconds. Commit it with a kernel that has
# changed. What they compute is judged in Triton's interpreter.
FEW := benchmarks/results/kernels/few.json

# One thread per test process, since pytest-xdist already fills the machine. Each process gets tests
# that stand together, and find compiled what their neighbours use; who has done steals the rest.
PYTEST := OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/pytest --dist worksteal -n $(JOBS)

.PHONY: demo test test-slow check fmt conformance oldest bench gpu docs wheel clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# The tests of one framework run in processes that import no other; conformance starts its own.
test: $(STAMP) $(PLAIN)
	PLAIN_CODE="$(PLAIN_CODE)" $(PYTEST) --doctest-glob='*.md' tests docs
	@set -e; for name in $(FRAMEWORKS) $(patsubst torch,kernels,$(filter torch,$(FRAMEWORKS))); do \
		echo "== tests/$${name}_only"; \
		if [ ! -d tests/$${name}_only ]; then echo "none there"; continue; fi; \
		rc=0; XLA_FLAGS="$$XLA_FLAGS $(PLAIN_CODE)" $(PYTEST) tests/$${name}_only || rc=$$?; \
		if [ $$rc -eq 5 ]; then echo "no tests there"; elif [ $$rc -ne 0 ]; then exit $$rc; fi; \
	done
# Keras comes with TensorFlow; where it is there, it also runs on each of the others.
	@set -e; if [ -n "$(filter tf,$(FRAMEWORKS))" ]; then for name in $(patsubst tf,tensorflow,$(FRAMEWORKS)); do \
		echo "== tests/keras_only, KERAS_BACKEND=$$name"; \
		XLA_FLAGS="$$XLA_FLAGS $(PLAIN_CODE)" KERAS_BACKEND=$$name $(PYTEST) tests/keras_only; \
	done; fi
	XLA_FLAGS="$$XLA_FLAGS $(PLAIN_CODE)" $(BIN)/attn-core conformance run --failures $(SUBJECTS) $(NATIVE)
ifneq ($(filter jax,$(FRAMEWORKS)),)
	$(BIN)/attn-core conformance run --failures --backend jax $(SHIPPED)
endif
ifneq ($(strip $(FRAMEWORKS)),)
	XLA_FLAGS="$$XLA_FLAGS $(PLAIN_CODE)" $(BIN)/attn-core conformance run --failures $(addprefix --form ,$(COMPILED)) \
		$(addprefix --backend ,$(FRAMEWORKS))
endif
ifneq ($(filter torch,$(FRAMEWORKS)),)
	@if $(BIN)/python -c "import triton" 2>/dev/null; then \
		set -ex; $(BIN)/attn-core kernels compile --few --json $(FEW) --resume; \
		TRITON_INTERPRET=1 $(BIN)/attn-core conformance run --failures --subject torch:triton; \
	else echo "triton is missing: its kernels were neither compiled nor judged"; fi
endif
ifneq ($(strip $(FRAMEWORKS)),)
	XLA_FLAGS="$$XLA_FLAGS $(PLAIN_CODE)" $(BIN)/attn-core conformance run --tier smoke --failures \
		$(foreach name,$(FRAMEWORKS),--subject $(name):reference)
endif

# What stands in tests/ starts processes of its own: one after the other.
test-slow: $(STAMP) $(PLAIN)
	$(PYTEST) -n 0 -m slow tests
ifneq ($(filter jax,$(FRAMEWORKS)),)
	XLA_FLAGS="$$XLA_FLAGS $(PLAIN_CODE)" $(PYTEST) -m slow tests/jax_only
endif

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/typecheck.py
	$(BIN)/pytest -q tests/test_imports.py -k direction

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

conformance: $(STAMP)
	$(BIN)/attn-core conformance run $(SUBJECTS)

# No job of CI runs these: a framework's oldest version is another environment, of its own NumPy.
oldest: $(addprefix oldest-,numpy $(FRAMEWORKS))

oldest-%:
	test -x $(VENV)/oldest/$*/bin/python || $(PYTHON) -m venv $(VENV)/oldest/$*
	$(VENV)/oldest/$*/bin/python -m pip install --quiet -c constraints-oldest.txt \
		numpy==$(if $(filter jax,$*),2.0.0,1.26.0) --editable ".$(addsuffix ],$(addprefix [,$(firstword $(extras_$*))))"
	$(VENV)/oldest/$*/bin/attn-core conformance run --tier smoke --failures --backend $* \
		$(addprefix --form ,eager $(if $(extras_$*),$(COMPILED)))

# Wrong answers of ours fail it; a missed target does not, and is published.
bench: $(STAMP) $(TIMED)
	$(BIN)/attn-core bench run --json $(RESULTS)
	$(BIN)/attn-core bench page $(RESULTS)

# It refuses where there is no CUDA device. What fails is written down as it happens, since such a
# machine may go away before the summary: in the folder beside the results.
gpu: $(STAMP)
	rc=0; $(BIN)/attn-core bench gpu $(if $(strip $(MINUTES)),--minutes $(MINUTES)) || rc=$$?; \
		if [ $$rc -ne 2 ]; then $(BIN)/attn-core bench gpu-page; fi; exit $$rc

docs: $(STAMP)
	$(BIN)/pytest --doctest-glob='*.md' docs

# setuptools copies into build/lib and never empties it, so a file deleted since would be shipped.
wheel: $(STAMP)
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamp's name holds the frameworks, so that asking for one more installs it. setuptools comes
# first, at its constrained version, because the build does not run isolated from the environment.
# Frameworks are 19,000 files, which pip would compile on one core; some are no Python, and stay. What
# nothing here imports, other people's tests and models, waits until somebody does.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --no-build-isolation \
		--editable ".[$(subst $(space),$(comma),$(strip $(EXTRAS)))]"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' \
		"$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" || true
	touch $@

# What is only timed against, and nothing of ours imports.
$(TIMED): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable ".[bench]" \
		&& touch $@ || echo "attn-core[bench] cannot be installed here: its peers are refused, by name"

$(PLAIN): $(STAMP) tools/plain_code.py
	$(BIN)/python tools/plain_code.py > $@
