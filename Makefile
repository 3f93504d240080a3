# Two commands do everything on a fresh Debian or Ubuntu machine: `make demo` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench bench-planning bench-planning-more bench-fedspine bench-mergesfl soak wheelhouse docs clean

PYTHON := .venv/bin/python
MUSTER := .venv/bin/muster

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what is missing (apt packages, .venv); quick when nothing changed
	@scripts/setup.sh

demo: setup ## Fine-tune MiniLM on four emulated devices over mosquitto; report and adapter in runs/demo
	$(MUSTER) emulate --devices 4 --profile mixed --data docstrings --job examples/demo.toml --out runs/demo

test: setup ## What every change must pass: checks, then all tests but the slow ones
	@scripts/check
	@scripts/test

test-all: setup ## The same with the slow tests: long transfers, long runs, the whole story on real hosts
	@$(PYTHON) -m tests.hosts
	@scripts/check
	@scripts/test --all $(TESTS)

check: setup ## Lint, format, types, import contracts
	@scripts/check

bench: setup ## Measure; writes bench/results.json and docs/benchmarks.md (keep the machine idle)
	$(PYTHON) bench/run.py

bench-planning: setup ## Strategies on a virtual fleet; resumable, writes docs/results.md (PROFILE=full for the whole grid)
	$(PYTHON) -m bench.planning --profile $(or $(PROFILE),standard)

bench-planning-more: bench-planning ## What stands beside the strategies in docs/results.md, too: the floor, exact aggregation, studies
	$(PYTHON) -m bench.planning --beside
	$(PYTHON) -m bench.planning --studies

bench-fedspine: setup ## FedSpine against its rivals on a virtual fleet; resumable, writes docs/results-fedspine.md
	$(PYTHON) -m bench.fedspine

bench-mergesfl: setup ## MergeSFL against its rivals on a virtual fleet; resumable, writes docs/results-mergesfl.md
	$(PYTHON) -m bench.mergesfl

soak: setup ## Many rounds on a small fleet; fails when memory or file descriptors grow
	$(PYTHON) bench/run.py --soak

wheelhouse: setup ## Wheels with hashes, from which hosts install without a network (docs/operations.md)
	$(PYTHON) scripts/wheelhouse.py

docs: setup ## Write the generated files anew: jobs, state-machines, wire-format, benchmarks, mosquitto.conf
	$(PYTHON) scripts/settings_doc.py
	$(PYTHON) scripts/machines_doc.py
	$(PYTHON) scripts/wire_doc.py
	$(MUSTER) broker config > deploy/mosquitto/mosquitto.conf
	$(PYTHON) bench/run.py --render

clean: ## Remove .venv, caches, builds and runs
	rm -rf .venv build dist runs wheelhouse .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
