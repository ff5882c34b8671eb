# The two commands of the README: `make demo` and `make test`. Both do all set-up (virtual environment, locked packages,
# Debian packages when root). Everything else here is for people who work on AlertMedic.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTEST := .venv/bin/python -m pytest
SEED ?=

RECORDINGS ?= ../shared/rca
# Sets that no license allows learning from.
UNLICENSED ?= sockshop
# The full comparison: its results, and how many worlds at once (one for each CPU; docs/chaos.md).
RESULTS ?= build/chaos/full.jsonl
WORLDS ?= 2
CHAOS_FULL = --share 6 --worlds $(WORLDS) --results "$(RESULTS)" --record build/chaos/recordings $(if $(SEED),--seed $(SEED))

.PHONY: help install demo serve evaluate learn test test-full lint format manifests bench chaos chaos-full lock clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: .venv/installed ## the command, in .venv/bin/alertmedic

.venv/installed: requirements.lock pyproject.toml
	@tools/make-venv requirements.lock
	@touch $@

.venv/installed-dev: requirements-dev.lock requirements-durable.lock pyproject.toml
	@tools/make-venv requirements-dev.lock
	@touch .venv/installed $@

demo: .venv/installed ## real faults in a real shop, detected, diagnosed, healed, verified
	@tools/install-debian demo
	@.venv/bin/python -m agent.demo $(if $(SEED),--seed $(SEED))

serve: .venv/installed ## the service on 127.0.0.1:9095
	@.venv/bin/alertmedic serve

test: .venv/installed-dev ## all tests, heavy suites as seeded subsets (under 10 minutes)
	@tools/install-debian test
	@tools/install-helm test
	@$(PYTEST) -m "not full" -n 2 --dist loadfile

test-full: .venv/installed-dev ## all tests at full volume
	@tools/install-debian full
	@tools/install-helm full
	@tools/build-apiserver
	@$(PYTEST)

lint: .venv/installed-dev ## ruff, mypy strict, the layer rule
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

format: .venv/installed-dev
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

manifests: .venv/installed-dev ## plain Kubernetes manifests from the chart, in build/manifests
	@tools/install-helm test
	@tools/render-manifests

evaluate: .venv/installed ## accuracy of diagnosis on RECORDINGS (../shared/rca), three ways, beside N-sigma and BARO
	@test -d "$(RECORDINGS)" || { echo "make evaluate: there are no recordings at $(RECORDINGS);" \
		"RECORDINGS=DIR names a directory of sets of recordings, each with truth.json (docs/diagnosis.md)" >&2; exit 1; }
	@.venv/bin/alertmedic evaluate "$(RECORDINGS)" --cross $(patsubst %,--unlicensed %,$(UNLICENSED)) --misses

learn: .venv/installed-dev ## learn rules/model.json from the licensed sets of RECORDINGS
	@.venv/bin/alertmedic learn $(foreach set,$(filter-out $(UNLICENSED),$(notdir $(patsubst %/,%,\
		$(wildcard $(RECORDINGS)/*/)))),"$(RECORDINGS)/$(set)") --output rules/model.json

bench: .venv/installed-dev ## ratios against named references, in one run
	@tools/install-debian test
	@.venv/bin/python -m bench

chaos: .venv/installed ## the quick scenarios, AlertMedic alone; fails when it does anything wrong (under 8 minutes)
	@tools/install-debian chaos
	@rm -f build/chaos/quick.jsonl
	@.venv/bin/alertmedic chaos run --quick --share 99 --results build/chaos/quick.jsonl $(if $(SEED),--seed $(SEED))

chaos-full: .venv/installed ## every scenario, every arm, three times, and with the agent killed (hours; goes on where it stopped)
	@tools/install-debian chaos
	@.venv/bin/alertmedic chaos run --arms nothing,liveness,command,auto,approve --repetitions 3 $(CHAOS_FULL) || [ $$? -eq 1 ]
	@.venv/bin/alertmedic chaos run --kill-agent $(CHAOS_FULL)

lock: ## write the lock files from pyproject.toml
	@tools/lock

clean:
	@rm -rf build .mypy_cache .ruff_cache .hypothesis
