# make demo   train and judge a small model on real pancreas cells
# make test   everything that must hold before a change is shared
# `make help` lists the rest. Needs Python 3.11 or newer and make; everything else goes into .venv/.

PYTHON ?= python3
FLAGS ?= slow
PROCESSOR ?=
OUT ?= runs/demo
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq -c constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed builds its operations when they are first used, not at installation.
export DS_BUILD_OPS := 0

# `make test SCEMB_DATA=` runs without the real data even where they lie beside the project.
ifeq ($(origin SCEMB_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export SCEMB_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test check export readme docs lab constraints clean

help:   ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- installation: each stamp is made once and again when a requirement changes -------------------------------------

.venv/.made:
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' here: install Python 3.11 or newer, or call make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"scemb needs Python 3.11 or newer, but $(PYTHON) is {v[0]}.{v[1]}: call make PYTHON=python3.11")'
	@[ -x $(BIN)/python ] || { echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; } || { echo "The venv module of $(PYTHON) does not work; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf .venv; exit 1; }
	@touch $@

# torch in a call of its own: pip then takes the build that the machine offers instead of the newest of many.
.venv/.torch: .venv/.made
	@echo "Installing torch (half a minute to several, by the size of the build)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/.demo: .venv/.torch setup.py settings.ini constraints.txt pyproject.toml
	@echo "Installing scemb and what the demo needs (about 1 minute)"
	@$(PIP) -e ".[demo]"
	@touch $@

.venv/.dev: .venv/.torch setup.py settings.ini constraints.txt pyproject.toml
	@echo "Installing scemb with all extras and the development tools (about 3 minutes, 3 GB)"
	@$(PIP) -e ".[dev]"
	@touch .venv/.demo $@

# --- what one does --------------------------------------------------------------------------------------------------

demo: .venv/.demo   ## train and judge a small model on real pancreas cells, into runs/demo (OUT=folder changes it)
	@$(BIN)/scemb demo --out $(OUT)

test: .venv/.dev   ## the whole suite, slow cells included (FLAGS="slow gpu net" runs more, PROCESSOR="no AVX2" forbids instructions)
	@$(BIN)/python .ci/suite.py --flags "$(FLAGS)" $(if $(PROCESSOR),--processor "$(PROCESSOR)")

check: .venv/.dev   ## the fast suite: static checks and unflagged cells of all pages but tutorials, launch and benchmarks
	@$(BIN)/python .ci/suite.py --fast

export: .venv/.dev   ## write scemb/ from the pages and clean the pages
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

readme: .venv/.dev   ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/docs.py readme

docs: .venv/.dev   ## render the documentation into _docs/
	@$(BIN)/python .ci/docs.py build

lab: .venv/.dev   ## open the pages in JupyterLab
	@TQDM_DISABLE=1 PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter lab nbs   # neither belongs into stored outputs

constraints: .venv/.dev   ## write constraints.txt from the installed versions
	@$(BIN)/python .ci/freeze.py
	@touch .venv/.demo .venv/.dev

clean:   ## remove what was built or rendered; .venv/ and runs/ stay
	@rm -rf _docs _proc build dist *.egg-info nbs/nbdev.yml nbs/sidebar.yml .ruff_cache
	@find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
