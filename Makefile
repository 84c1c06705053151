# The commands of this repository; `make help` lists them. Needs Python 3.11 or newer with venv, gcc and make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# torch's threads spin in their barriers for long unless told otherwise (docs/adr/0007), and nothing here may reach for a model hub. Set before torch is imported.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 5000
export HF_HUB_OFFLINE := 1

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LISTEN ?= 127.0.0.1:8470
METRICS ?= 127.0.0.1:8471

# The roots, for a machine where nothing is installed.
ROOTS := server:trainer:adapters:kernels:bases:clients/python:protos

# Generated code must import on the oldest runtime that pyproject.toml declares, so the generator is pinned there, in an environment of its own.
PROTOS_VENV := .venv-protos
PROTOS_TOOLS := grpcio-tools==1.76.0 mypy-protobuf==3.7.0
PROTOS_INSTALLED := $(PROTOS_VENV)/.installed-$(subst ==,-,$(subst $() ,-,$(PROTOS_TOOLS)))

.PHONY: help install demo demo-train serve check test soak bench quality quality-page gpu protos clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Make .venv with everything that the other commands need

# torch is capped in this very command (by the server extra), so that pip takes the small CPU build and no other package pulls a larger one.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Motley needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing (Debian: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

demo: install ## Start a server, send one wave of mixed adapters, show what each answered; BASE=nf4 or int8 quantizes the base, BASE=pruned prunes it
	$(BIN)/motley demo $(if $(filter pruned,$(BASE)),--pruned,$(if $(BASE),--quantize $(BASE)))

demo-train: install ## Start a server and a worker, train three adapters while requests go on, and show them answer beside the others
	$(BIN)/motley demo-train

EMBEDDED := adapters/motley_adapters/assets/tiny
ADAPTERS := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard $(EMBEDDED)/*/adapter_model.safetensors)))))

serve: install ## Keep a server up with the embedded base and adapters
	@echo "When it is ready, try in another terminal:"
	@echo "  $(BIN)/motley generate '$(firstword $(ADAPTERS)): kettle =' --server $(LISTEN) --adapter $(firstword $(ADAPTERS))"
	exec $(BIN)/motley serve --base tiny --listen $(LISTEN) --metrics $(METRICS) \
		$(foreach name,$(ADAPTERS),--adapter $(name)=$(EMBEDDED)/$(name))

check: install $(PROTOS_INSTALLED) ## Format, lint, types, import contracts, protos, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	cd protos && ../$(BIN)/buf lint
	.ci/check_protos.sh
	$(BIN)/hadolint Dockerfile

# Many tests wait for processes and timers, so two share two cores well; the tests of a file stay together, and share its fixtures. The long ones are
# among the files of few tests, which xdist by itself would leave for the end, where one core idles.
test: install ## The tests; those of the kernels, and of Triton's interpreter, in processes of their own
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/integration tests/unit
	$(BIN)/python -m pytest tests/kernels
	$(BIN)/python -m pytest tests/kernels_triton

soak: install ## The tests that take minutes
	$(BIN)/python -m pytest -m soak -o faulthandler_timeout=900 tests/unit tests/integration || test $$? -eq 5 # 5: there are none

bench: install ## The measurements on this machine, beside their peers
	@for script in $$(grep -l __main__ benchmarks/*.py | grep -v '_gpu\.py$$'); do echo "== $$script"; $(BIN)/python "$$script"; done

# A subject is one script there; `make quality-page` measures nothing, and writes the page from the result files as they are.
quality: install ## Measure what the methods' claims come to on the embedded base (those of training, where torch sees a GPU, on a larger one), and write docs/quality.md, which says how long that took
	@for script in $$(grep -l __main__ benchmarks/quality/*.py | grep -v '/page\.py$$'); do echo "== $$script"; $(BIN)/python "$$script"; done
	$(BIN)/python benchmarks/quality/page.py

quality-page: install
	$(BIN)/python benchmarks/quality/page.py

# Runs where nothing was installed for it, from the roots, with whatever python3 there has; and where there is no GPU says so. Another release of torch or
# transformers there may warn of what ours does not: that is shown and fails nothing. All of it shares one bound in seconds.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_SECONDS := 520

gpu: export PYTHONPATH := $(ROOTS)
gpu: ## The tests and measurements that need a GPU; without one, says so
	@if ! $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		echo "No GPU that torch can use: nothing run."; \
	else \
		timeout --verbose $(GPU_SECONDS) $(GPU_PYTHON) -m pytest -W default tests/gpu; \
		for script in benchmarks/*_gpu.py; do \
			echo "== $$script"; timeout --verbose $$(($(GPU_SECONDS) > SECONDS ? $(GPU_SECONDS) - SECONDS : 1)) $(GPU_PYTHON) "$$script"; \
		done; \
	fi

$(PROTOS_INSTALLED):
	@rm -f $(PROTOS_VENV)/.installed-*
	@test -x $(PROTOS_VENV)/bin/pip || $(PYTHON) -m venv $(PROTOS_VENV)
	$(PROTOS_VENV)/bin/pip install --disable-pip-version-check --quiet $(PROTOS_TOOLS)
	@touch $@

protos: $(PROTOS_INSTALLED) ## Write the generated code anew, beside the .proto files
	.ci/generate_protos.sh protos

clean: ## Remove the environments and everything made by tools
	rm -rf $(VENV) $(PROTOS_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
