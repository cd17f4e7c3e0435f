# Everything starts from a machine with Python >= 3.10, make and git. Each command sets up .venv on its first run and skips
# what is done. Another interpreter: make test PYTHON=python3.12. More arguments: make test ARGS="-k noising -x".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# two processes, each with whole files, whose expensive fixtures are then made once; ARGS="-n 0" for one
TWO := -n 2 --dist loadfile

PACKAGES := noising sampling training callbacks
SOURCES := $(PACKAGES) $(wildcard $(addsuffix /*.py,$(PACKAGES)))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-random test-slow test-kernels bench docs mutants lint release clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## set up .venv: torch, then alphabar (editable) with all that its tests need

demo: $(VENV)/.installed  ## train the small demo model on two CPU cores, sample from it, write runs/demo
	$(BIN)/python examples/train_brightness.py --prediction_type v_prediction --rescale_betas_zero_snr --out runs/demo $(ARGS)

test: $(VENV)/.installed  ## run the tests, without the slow ones
	$(BIN)/pytest $(TWO) $(ARGS)

test-random: $(VENV)/.installed  ## run the same tests in a random order; ARGS="--randomly-seed=N" repeats one
	$(BIN)/pytest -p randomly $(TWO) $(ARGS)

test-slow: $(VENV)/.installed  ## run the slow tests
	$(BIN)/pytest -m slow $(ARGS)

test-kernels: $(VENV)/.installed  ## run the GPU kernels on the CPU, in triton's interpreter (installs triton, 1 GB)
	$(BIN)/pip install --quiet triton==3.9.0
	$(BIN)/pytest tests/test_gpu_kernels.py $(ARGS)

bench: $(VENV)/.installed  ## measure speed and accuracy beside diffusers, write benchmarks/*.md; some minutes on idle cores
	for name in noising sampling schedulers strata shared_noise; do $(BIN)/python benchmarks/$$name.py > benchmarks/$$name.md || exit 1; done
	$(BIN)/python benchmarks/previews.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/fitting.py

docs: $(VENV)/.installed  ## build the site in docs/_build/html, offline once installed; a warning fails
	$(BIN)/pip install --quiet -e '.[docs]' -c constraints.txt
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

mutants: $(VENV)/.installed  ## see whether the tests notice mistakes made on purpose; ARGS="unipc" for some files
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/.installed .lint/installed  ## ruff, and types checked against the installed wheel
	$(BIN)/ruff check .
	$(BIN)/basedpyright

release: $(VENV)/.installed  ## build sdist and wheel in dist/, check both, run them in empty environments of each Python
	$(BIN)/pip install --quiet -e '.[release]' -c constraints.txt
	$(BIN)/python .ci/release.py $(ARGS)

clean:  ## remove build products and caches, keep .venv and runs
	rm -rf .lint build dist alphabar.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned, so that nothing that depends on it can choose another one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "alphabar needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; say which: make PYTHON=python3.12 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@

# Static tools do not follow the import hook of an editable install, so the wheel is installed here for them; stale
# files under build/ would end up in it.
.lint/installed: $(SOURCES) pyproject.toml $(VENV)/.installed
	rm -rf .lint build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target .lint/site .
	@rm -rf build
	@touch $@
