# Everything runs from .venv, which the first target that needs it creates from pinned versions (constraints.txt).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo_output
WORKERS ?= 2
# Few tests at a time, or one worker has long ones left when the other has none.
SHARED := -n $(WORKERS) --maxschedchunk 4

export PIP_DISABLE_PIP_VERSION_CHECK := 1

STAMPS := $(addprefix $(VENV)/.installed-,demo test docs release)
READY_demo := $(VENV)/.installed-demo
READY_test := $(VENV)/.installed-test
READY_docs := $(VENV)/.installed-docs
READY_release := $(VENV)/.installed-release

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fast lint types wheel-test extras-test node-test arm-test emulated-test migration-test reliability wheels licences tables picture versions docs bench clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY_demo) ## Train, lower, export and serve real networks; writes to $(OUT)
	$(BIN)/srigl-fx demo --out $(OUT)

test: $(READY_test) ## The tests that take about half a second each at most: some ten minutes together
	$(BIN)/python -m pytest $(SHARED) -m "not long"

test-all: $(READY_test) ## All tests, those of whole models, of whole runs and of other instruction sets included
	$(BIN)/python -m pytest $(SHARED)

fast: $(READY_test) ## The tests that take a quarter of a second each at most: three minutes together
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

lint: $(READY_test) ## Style, with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY_test) ## Types, with mypy --strict
	$(BIN)/mypy

wheel-test: $(READY_test) ## Build the wheel and run the fast tests against it, from a folder of its own
	BIN=$(abspath $(BIN)) WORKERS=$(WORKERS) .ci/wheel_test

extras-test: $(READY_test) ## The tests that need what no other target installs: tools around ONNX, pruning, optimizers, pages
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs,onnx-tools,optimizers,pruning]'
	$(BIN)/python -m pytest tests/test_docs.py tests/test_onnx_tools.py tests/test_pruning_libraries.py tests/test_benchmarks.py tests/train/test_optimizer_libraries.py

wheels: $(READY_release) ## Build what is uploaded into dist/, and check it: sdist, wheels, those for Linux with the operator library in them
	$(BIN)/python .ci/wheels.py dist
	$(BIN)/python -m twine check --strict dist/*.tar.gz dist/*.whl

licences: $(READY_release) ## The licences of all packages that the core needs, into dist/licences.md and dist/licences.json
	$(BIN)/python .ci/licences.py dist

node-test: $(READY_test) ## The fallback in Node.js and in WebAssembly; installs both hosts with npm into .node (500 MB)
	npm install --prefix .node --ignore-scripts --no-audit --no-fund onnxruntime-node@1.30.0 onnxruntime-web@1.30.0
	SRIGL_FX_NODE_MODULES=$(CURDIR)/.node/node_modules $(BIN)/python -m pytest tests/test_node.py

emulated-test: $(READY_test) ## The oracle tests of instruction sets that this CPU lacks, AVX-512 and VNNI, in an emulator
	BIN=$(abspath $(BIN)) .ci/emulated_test

migration-test: $(READY_demo) ## The lines of other libraries on docs/migrating.md, with those libraries; downloads about 1 GB
	$(BIN)/python .ci/migration_test.py

reliability: $(READY_test) ## Damaged files, guard pages, threads, sessions, valgrind: into docs/reliability.md
	PYTHONPATH=tests $(BIN)/python tests/reliability.py

arm-test: $(READY_test) ## The operator library for Linux on Arm under qemu-user, in ONNX Runtime for Arm; downloads 100 MB into .arm
	$(BIN)/python .ci/arm_test.py .arm

tables: $(READY_test) ## Write the tables of docs/kernels.md, docs/command-line.md and docs/findings.md anew
	$(BIN)/python tests/kernel_support/tables.py
	PYTHONPATH=tests $(BIN)/python tests/cli_support/page.py
	PYTHONPATH=tests $(BIN)/python tests/findings_support/__init__.py

picture: $(READY_demo) ## Make the picture and the tables of README.md and docs/index.md anew, from benchmarks/results
	$(BIN)/python benchmarks/front_page.py

versions: ## Run the tests on the oldest and the newest releases allowed; writes docs/versions.md (hours, 12 GB)
	$(PYTHON) .ci/versions.py

docs: $(READY_docs) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY_demo) ## Time condensed layers against dense ones on this machine
	$(BIN)/srigl-fx bench

clean: ## Remove what was built (not .venv)
	rm -rf build dist site demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed (found: $(PYTHON)); say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS): $(VENV)/.installed-%: pyproject.toml constraints.txt $(wildcard .ci/install_*.py) | $(BIN)/python
	@echo "Installing srigl-fx[$*] and what it needs into $(VENV); the first time takes a few minutes."
	$(BIN)/python .ci/install_torch.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	if [ $* = test ]; then $(BIN)/python .ci/install_zoo.py; fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$*]'
	@touch $@
