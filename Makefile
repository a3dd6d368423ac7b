# Every command a person runs. `make help` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
STAMP := .venv/.stamp
RUN := .venv/bin/python

# PYTHON names the interpreter that makes .venv; in `make extension` also a Python of Blender's ("3.13"), which is neither name nor path.
override BLENDER_PYTHON := $(if $(findstring python,$(value PYTHON))$(findstring /,$(value PYTHON)),,$(value PYTHON))
SETUP_PYTHON := $(if $(BLENDER_PYTHON),python3.11,$(PYTHON))

# What people type goes to the recipes through the environment, exactly as typed: never through make's or the shell's own expansion.
override PROMPT := $(value PROMPT)
override PROMPTS := $(value PROMPTS)
override SEED := $(if $(value SEED),$(value SEED),0)
override COUNT := $(if $(value COUNT),$(value COUNT),1)
override OUT := $(if $(value OUT),$(value OUT),out)
override PRESET := $(value PRESET)
override VERSIONS := $(value VERSIONS)
override PLATFORM := $(value PLATFORM)
export PROMPT PROMPTS SEED COUNT OUT PRESET VERSIONS PLATFORM BLENDER_PYTHON
export TORCH_INDEX PYTHON311 PYTHON313

.PHONY: help setup infinigen generate batch train test test-blender interop lint bench extension index docs lock lock-wheels clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# $(call with_python,TARGET,SCRIPT): runs a script that makes an environment.
define with_python
@"$(SETUP_PYTHON)" -c '' >/dev/null 2>&1 || { \
	echo 'make $(1): Python 3.11 was not found: install it (Debian 12: sudo apt-get install python3.11 python3.11-venv)' \
		'or name it: make $(1) PYTHON=/path/to/python3.11' >&2; exit 2; }
@"$(SETUP_PYTHON)" $(2)
endef

setup: ## make .venv with everything in it (TORCH_INDEX=URL chooses where torch comes from)
	$(call with_python,setup,tools/setup.py)

# Every other target comes here when the requirements changed; setup.py itself decides by content whether there is work.
$(STAMP): pyproject.toml requirements.lock tools/setup.py
	$(call with_python,setup,tools/setup.py)

infinigen: ## make .venv-infinigen, which the object source infinigen runs in (2.5 GB)
	$(call with_python,infinigen,tools/setup_infinigen.py)

generate: $(STAMP) ## one object from PROMPT="a red armchair" [SEED=0] [COUNT=1] [OUT=out]: .blend, .ply and .png
	@test -n "$$PROMPT" || { echo 'make generate: PROMPT is empty: make generate PROMPT="a red armchair"' >&2; exit 2; }
	@$(RUN) tools/blender.py generate --prompt="$$PROMPT" --seed="$$SEED" --count="$$COUNT" --out="$$OUT"

batch: $(STAMP) ## every line of PROMPTS=file into OUT=dir; resumes, goes on after an error
	@test -n "$$PROMPTS" || { echo 'make batch: PROMPTS is empty: make batch PROMPTS=prompts.txt OUT=out' >&2; exit 2; }
	@$(RUN) tools/blender.py generate --prompts="$$PROMPTS" --seed="$$SEED" --count="$$COUNT" --out="$$OUT"

train: $(STAMP) ## objects to a model bundle: PRESET=tiny|starter|everyday|paper
	@test -n "$$PRESET" || { echo 'make train: PRESET is empty: make train PRESET=tiny (or starter, paper)' >&2; exit 2; }
	@$(RUN) -m trainer train --preset="$$PRESET"

test: $(STAMP) ## the whole suite, and the add-on's tests once more against the installed extension [COVERAGE=1]
	@$(RUN) -m pytest $(if $(value COVERAGE),--cov)
	@$(RUN) tools/extension.py test

test-blender: $(STAMP) ## the add-on's tests on Blender 4.5, 5.0 and 5.2, each in an environment of its own [VERSIONS="4.5 5.2"] [SKIP=1]
	@$(RUN) tools/matrix.py $$VERSIONS $(if $(value SKIP),--skip-missing)

interop: $(STAMP) ## other programs read our splat files and we theirs, as a table; those of npm go into .interop (220 MB, Node.js 20)
	@$(RUN) tools/interop.py

lint: $(STAMP) ## ruff, types by mypy, and Blender's check of the manifest
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(RUN) tools/extension.py validate

bench: $(STAMP) ## every benchmark beside its peer or reference
	@for script in benchmarks/[a-z]*.py; do test -e "$$script" || continue; echo "== $$script"; $(RUN) "$$script" || exit 1; done

extension: $(STAMP) ## the zip in dist/, for this machine or [PLATFORM=linux-x64|windows-x64|macos-arm64] [PYTHON=3.11|3.13] [CUDA=1]
	@$(RUN) tools/extension.py build --platform="$$PLATFORM" --python="$$BLENDER_PYTHON" $(if $(value CUDA),--cuda)

index: $(STAMP) ## dist/index.json: with the zips beside it, a repository that Blender installs and updates from
	@$(RUN) tools/extension.py index

docs: ## the documentation site in site/, built strictly, in an environment of its own (.venv-docs, 165 MB)
	$(call with_python,docs,tools/pages.py)

lock: $(STAMP) ## rewrite requirements.lock from the environment in use
	@$(RUN) tools/lock.py

lock-wheels: $(STAMP) ## rewrite extension.lock, the wheels of every extension zip, from what the package index says
	@$(RUN) tools/extension.py lock

clean: ## remove what builds and runs leave behind; keeps .venv, out and trained models
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
