# Two commands do all the set-up: `make demo` and `make test`. Both need Python >= 3.10, make and git.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q
# A test that hangs, even with the GIL held, is named with the lines it stands at, and its process ended.
HANGS  := -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

.DEFAULT_GOAL := help
.PHONY: help demo test check docs bench bench-audit test-slow test-integrations clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "learnables needs Python >= 3.10; found: $$($(PYTHON) --version 2>&1)"; \
	  echo "mend: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "this Python cannot make virtual environments: its venv module is packaged apart"; \
	  echo "mend: sudo apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY) ## train a small Vision Transformer on digits: audited, watched, with a report
	$(BIN)/learnables train vit --data digits --name demo

test: $(READY) ## every test that is not marked slow
	$(PYTEST) -n 2 --dist worksteal $(HANGS) -m "not slow and not integration"

check: $(READY) ## lint, format, types, layers, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

docs: $(READY) ## write the generated pages again (rules)
	$(BIN)/python docs/generate.py

test-slow: $(READY) ## the tests that take minutes
	$(PYTEST) -m slow

test-integrations: $(READY) ## real timm and transformers models, in an environment of their own
	bash tests/integrations/run.sh

bench: $(READY) ## every published figure again, with the environment beside it
	for script in benchmarks/[a-z]*.py; do case $$script in */environment.py) ;; *) $(BIN)/python $$script || exit 1;; esac; done

bench-audit: $(READY) ## the zoo of real bugs: what the audit finds, beside the tools that can be installed
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/zoo_peers.py

clean: ## remove the environment and what the tools wrote
	rm -rf $(VENV) .venv-integrations build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
