# Everything from a fresh machine: `make demo` and `make test` need nothing done before.
# `make` lists the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
SHELL := /bin/sh
PY := .venv/bin/python
# nice: a build should not make the machine unusable. GO: go with the engine's flags.
NICE := nice -n 5
GO := eval "$$(tools/build/env.sh)" && $(NICE) go
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GO_DIRS := $(filter-out build dist,$(sort $(foreach f,$(wildcard */*.go */*/*.go */*/*/*.go */*/*/*/*.go),$(firstword $(subst /, ,$(f))))))
C_FILES := $(wildcard pybind/*.cc pybind/*.h capi/*.c capi/*.h engine/*/*.h tests/simdevice/*.cc)
PYTEST_ARGS ?=

.PHONY: help doctor venv build test test-go test-py demo bench wheel lint fmt docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

doctor: ## look whether everything the build needs is installed
	@tools/build/doctor.sh -q

venv: doctor ## make .venv, or bring it up to pyproject.toml
	@"$$(tools/build/python.sh)" tools/build/venv.py

# native.py compares contents, so it runs each time and takes a fraction of a second if nothing changed.
build: venv ## build the engine's libraries into python/nnsight_go/_lib
	@$(PY) tools/build/native.py

test: test-go test-py ## set up everything and run all tests

test-go: build ## run the Go tests
	@$(GO) build ./... && $(GO) test ./...

test-py: build ## run the Python tests (PYTEST_ARGS="-k wheel" chooses)
	@$(NICE) $(PY) -m pytest $(PYTEST_ARGS)

demo: build ## set up everything and run the main job: examples/quickstart.py
	@$(PY) examples/quickstart.py --out build/demo

bench: build ## measure against transformers, hooks and other libraries; writes build/bench (BENCH_ARGS)
	@$(PY) -m tests.bench $(BENCH_ARGS)

wheel: build ## build a wheel for this Python into dist/
	@rm -f dist/*.whl
	@$(NICE) $(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

lint: build ## check formats, types and common mistakes; changes nothing
	@echo "lint: gofmt" && test -z "$$(gofmt -l $(GO_DIRS) | tee /dev/stderr)"
	@echo "lint: go vet" && $(GO) vet ./...
	@echo "lint: staticcheck" && $(GO) run $(STATICCHECK) ./...
	@echo "lint: go mod tidy" && go mod tidy -diff
	@echo "lint: ruff" && $(PY) -m ruff check . && $(PY) -m ruff format --check .
	@echo "lint: mypy" && $(PY) -m mypy python/nnsight_go
	@echo "lint: clang-format" && .venv/bin/clang-format --dry-run -Werror $(C_FILES)

fmt: venv ## format all sources
	@gofmt -w $(GO_DIRS)
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format .
	@.venv/bin/clang-format -i $(C_FILES)

docs: build ## check the links of all documents and run the examples in them
	@$(NICE) $(PY) tools/build/docs.py

clean: ## remove what was built; .venv and the user's cache stay
	rm -rf build dist python/nnsight_go/_lib .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean ## remove .venv as well
	rm -rf .venv

