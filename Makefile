# make demo, test, bench, docs or wheel does all its set-up; a second run only what changed.
# PYTHON=/path/to/python takes a ready interpreter instead of .venv: offline, nothing but fastrnn itself is installed.
# ARGS="..." goes to the demo or the benchmarks, or as options to pytest.
# make gpu is for a machine with a GPU: with its own python3 it builds, tests, checks and measures in GPU_SECONDS.

SHELL := bash
NATIVE := CMakeLists.txt setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
PURE := $(shell find fastrnn kernels -name '*.py' -o -name py.typed)

ifneq ($(filter gpu%,$(MAKECMDGOALS)),)
PYTHON ?= python3
endif

ifdef PYTHON
PY := $(PYTHON)
DEPENDENCIES := pyproject.toml
INSTALLED := build/installed-$(subst /,-,$(PYTHON))
BENCH_READY := $(INSTALLED)
else
PY := .venv/bin/python
DEPENDENCIES := .venv/dependencies
INSTALLED := .venv/installed
BENCH_READY := .venv/bench-peers
endif

GPU_SECONDS ?= 460
BENCH_SECONDS ?= 240
ATTENTION := tests/gpu/test_attention.py
SEARCH := tests/gpu/test_top_k.py tests/gpu/test_search.py
GPU_PARTS := gpu-test gpu-attention gpu-search gpu-exchange gpu-sanitize gpu-bench

# What compiles, emulates and interprets: about half of all the time.
KERNELS := tests/kernels tests/cuda_emulator tests/csrc tests/gpu tests/test_build.py tests/test_cuda_resources.py
TEST_PARTS := test-kernels test-rest

.PHONY: demo examples test $(TEST_PARTS) drop-in lint bench docs wheel clean gpu gpu-build $(GPU_PARTS)

demo: $(INSTALLED)
	$(PY) examples/char_lm.py $(ARGS)

# All of them, small. EWT and WNUT are folders with these data sets, which are fetched if not given.
examples: $(INSTALLED)
	@failed=; run() { echo "== $$*"; $(PY) examples/"$$@" --output runs/small/$${1%.py} || failed="$$failed $$1"; }; \
	run char_lm.py --iterations 100; \
	run g2p.py --iterations 50 --models none additive --beams 1; \
	run translate.py --iterations 50 --sentences 2000; \
	run caption.py --iterations 200; \
	run pos.py --iterations 50 $(addprefix --data=,$(EWT)); \
	run ner.py --iterations 50 $(addprefix --data=,$(WNUT)); \
	run vowels.py --iterations 100; \
	run forecast.py --iterations 100; \
	run gradient_flow.py --iterations 100; \
	run cartpole.py --iterations 100; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# Two processes at a time, each of which says what it did when it is done.
test: lint
	@$(MAKE) --no-print-directory -j 2 -O $(TEST_PARTS)

test-kernels: $(INSTALLED)
	$(PY) -m pytest -q $(KERNELS) $(ARGS)

test-rest: $(INSTALLED)
	$(PY) -m pytest -q tests $(addprefix --ignore=,$(KERNELS)) $(ARGS)

# Other people's projects with our modules inside, in an environment of their own. Its threads spin as long as they do
# where nothing is set, unlike those of the other tests: the times that it prints are what users have.
drop-in: .venv-drop-in/installed
	GOMP_SPINCOUNT=300000 .venv-drop-in/bin/python -m pytest -q --disable-warnings tests/drop_in $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .
	$(PY) -m mypy

bench: $(BENCH_READY)
	$(PY) -m bench $(ARGS)

# The modules that repeat what their package shows are left out.
docs: $(INSTALLED)
	$(PY) -m pdoc -o build/docs -t docs/templates -d google fastrnn fastrnn.ops fastrnn.reference \
	  '!fastrnn.explain' '!fastrnn\.(ops|reference|search)\..*'

# Every part runs, also after one that failed. The suites come last and get the time that is left.
gpu:
	@$(MAKE) --no-print-directory gpu-build || exit; \
	for part in $(GPU_PARTS); do \
	  echo "== $$part, $$SECONDS s"; \
	  $(MAKE) --no-print-directory $$part BENCH_SECONDS=$$(($(GPU_SECONDS) - SECONDS)) || failed="$$failed $$part"; \
	done; \
	echo "== $$SECONDS s"; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu-build: $(INSTALLED)
	@$(PY) -c 'import torch; torch.cuda.is_available() or exit("make gpu: torch sees no CUDA device")'

gpu-test: gpu-build
	timeout 120 $(PY) -m pytest tests/gpu -q $(addprefix --ignore=,$(ATTENTION) $(SEARCH)) $(ARGS)

# Apart, since Triton compiles nearly every case anew, which may take longer than this.
gpu-attention: gpu-build
	timeout 90 $(PY) -m pytest $(ATTENTION) -v $(ARGS)

gpu-search: gpu-build
	timeout 90 $(PY) -m pytest $(SEARCH) -v $(ARGS)

gpu-exchange: gpu-build
	timeout 60 $(PY) -m bench.gpu.exchange

gpu-sanitize: gpu-build
	$(PY) -m bench.gpu.sanitize --seconds 90

gpu-bench: gpu-build
	$(PY) -m bench.gpu --seconds $(BENCH_SECONDS)

wheel: dist/built

clean:
	rm -rf build dist *.egg-info fastrnn/_C*.so .venv/installed

.venv/bin/python:
	python3 -m venv .venv

# torch by its exact version first: left to the package's own requirement, pip would take the newest.
.venv/dependencies: pyproject.toml requirements-test.txt | .venv/bin/python
	$(PY) -m pip install -q -r requirements-test.txt
	FASTRNN_NO_EXT=1 $(PY) -m pip install -q --no-build-isolation -e '.[test,docs,examples]'
	touch $@

$(INSTALLED): $(NATIVE) $(DEPENDENCIES)
	$(PY) -m pip install -q --no-build-isolation --no-index --no-deps -e .
	mkdir -p $(@D) && touch $@

# The extension in the source tree serves here too, as this is the same Python.
.venv-drop-in/installed: pyproject.toml requirements-test.txt tests/drop_in/requirements.txt | $(INSTALLED)
	$(PY) -m venv .venv-drop-in
	.venv-drop-in/bin/pip install -q -c requirements-test.txt torch setuptools -r tests/drop_in/requirements.txt
	FASTRNN_NO_EXT=1 .venv-drop-in/bin/pip install -q --no-build-isolation -e '.[test]'
	touch $@

.venv/bench-peers: $(INSTALLED)
	$(PY) -m pip install -q --no-build-isolation -e '.[bench]'
	touch $@

# Nothing is grafted into the wheel: auditwheel names the oldest glibc that it runs on. It looks for patchelf on PATH.
dist/built: $(NATIVE) $(PURE) $(DEPENDENCIES) README.md LICENSE MANIFEST.in
	rm -rf dist
	$(PY) -m build --no-isolation --skip-dependency-check --sdist --wheel
	PATH=$(abspath $(dir $(PY))):$$PATH $(PY) -m auditwheel repair -w dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	touch $@
