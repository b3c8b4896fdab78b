# `make` lists the targets. Each sets up what it needs in $(VENV).
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO := jacserve/v1/jacobian.proto jacserve/v1/jobs.proto jacserve/v1/admin.proto
# Where googleapis-common-protos has put google/rpc/status.proto.
GOOGLEAPIS = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iproto -I$(GOOGLEAPIS) \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTO)

.PHONY: help
help: ## Lists these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("jacserve needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Installing into $(VENV) (once; a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@$(BIN)/python -m pip install --quiet -e ".[server,cli,jobs]"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the development tools ..."
	@$(BIN)/python -m pip install --quiet -e ".[server,cli,jobs,postgres,sparse,plot,otel]" --group dev
	@touch $@

.PHONY: install
install: $(VENV)/.dev ## Makes the virtual environment, with all tools

.PHONY: demo
demo: $(VENV)/.runtime ## Starts a server and tours it through the client
	@$(BIN)/python examples/tour.py

.PHONY: serve
serve: $(VENV)/.runtime ## Serves examples/functions.py on localhost:50051
	@$(BIN)/jacserve serve examples/functions.py

.PHONY: test
test: $(VENV)/.dev ## Runs the tests
	@$(BIN)/python -m pytest -n 3  # Many wait for servers to start.

.PHONY: test-slow
test-slow: $(VENV)/.dev ## Runs the tests that take longer, such as the gallery's pages
	@$(BIN)/python -m pytest -m slow

.PHONY: test-gpu
test-gpu: $(VENV)/.dev ## Runs the tests that need a GPU; says so where there is none
	@$(BIN)/python -m pytest -n 0 -m gpu -rs

.PHONY: fuzz
fuzz: $(VENV)/.dev ## Fuzzes the decoders with new messages: FUZZ_COUNT of them
	@cd tests && ../$(BIN)/python -m fuzzing --guided $${FUZZ_COUNT:-1000000} $$RANDOM

.PHONY: soak
soak: $(VENV)/.dev ## Runs everything at once beside kills, for SOAK_S seconds (600)
	@$(BIN)/python -m benchmarks.soak

.PHONY: deploy-check
deploy-check: $(VENV)/.dev ## Checks deploy/ by the tools that are installed
	@deploy/check.sh $(abspath $(BIN))

.PHONY: gallery
gallery: $(VENV)/.dev ## Runs the pages of examples/gallery, and draws their pictures
	@$(BIN)/python examples/gallery/run.py

.PHONY: bench
bench: $(VENV)/.dev ## Measures the fast path beside its floors; ten minutes at most
	@$(BIN)/python -m benchmarks.fast_path

.PHONY: bench-quick
bench-quick: $(VENV)/.dev ## The same in two minutes, to see that it works
	@$(BIN)/python -m benchmarks.fast_path --quick

.PHONY: bench-gpu
bench-gpu: $(VENV)/.dev ## The same with functions on a GPU, where there is one
	@$(BIN)/python -m benchmarks.fast_path --device gpu

.PHONY: bench-jobs
bench-jobs: $(VENV)/.dev ## Measures batch jobs beside loops; ten minutes at most
	@$(BIN)/python -m benchmarks.jobs

.PHONY: bench-sparse
bench-sparse: $(VENV)/.dev ## Times sparse Jacobians beside dense ones and asdex
	@$(BIN)/python benchmarks/sparse.py

.PHONY: bench-fusion
bench-fusion: $(VENV)/.dev ## Times several quantities at once beside each alone
	@$(BIN)/python benchmarks/fusion.py

.PHONY: bench-chunks
bench-chunks: $(VENV)/.dev ## Times Jacobians all at once and in chunks
	@$(BIN)/python benchmarks/chunks.py

.PHONY: bench-isolation
bench-isolation: $(VENV)/.dev ## Times functions in a worker process beside others
	@$(BIN)/python benchmarks/isolation.py

.PHONY: check
check: format-check lint types layers proto-check test ## Runs everything that CI runs

.PHONY: format
format: $(VENV)/.dev ## Formats the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: format-check
format-check: $(VENV)/.dev
	@$(BIN)/ruff format --check .

.PHONY: lint
lint: $(VENV)/.dev ## Lints the code
	@$(BIN)/ruff check .

.PHONY: types
types: $(VENV)/.dev ## Checks the types
	@$(BIN)/pyright

.PHONY: layers
layers: $(VENV)/.dev ## Checks the architecture: who may import whom
	@$(BIN)/lint-imports

.PHONY: proto
proto: $(VENV)/.dev ## Generates client/jacserve/v1 from proto/
	@$(call PROTOC,client)

.PHONY: proto-check
proto-check: $(VENV)/.dev ## Checks that the generated code is fresh and documented
	@rm -rf build/proto && mkdir -p build/proto
	@$(call PROTOC,build/proto)
	@diff -r -x __init__.py -x __pycache__ build/proto/jacserve/v1 client/jacserve/v1 \
		|| { echo "The generated code is stale: run make proto."; exit 1; }
	@! grep -n "Missing associated documentation comment" client/jacserve/v1/*.py \
		|| { echo "An RPC of the contract has no comment."; exit 1; }
	@echo "The generated code is fresh."

.PHONY: build
build: $(VENV)/.dev ## Builds the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## Removes what these targets made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
