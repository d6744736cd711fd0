# The four commands of the README; each makes the environment first if it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV ?= .venv
CORES ?= all
STAMP := $(VENV)/.installed
ZOO_VENV ?= .venv-zoo
ZOO_STAMP := $(ZOO_VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment reproduce test lint zoo clean distclean

help:
	@echo 'make reproduce   the whole study: measurements, figures, report and notebook into outputs/'
	@echo '                 (SNAKEMAKE_ARGS="--config data=FOLDER" for other images)'
	@echo 'make test        the tests (PYTEST_ARGS="-k name" for some of them)'
	@echo 'make lint        style, formatting, types and workflow'
	@echo 'make zoo         networks of other packages, split and whole, into docs/zoo.md: hours, in an environment of its own'
	@echo '                 (ZOO_ARGS="--help" for some of them, or anew)'
	@echo 'make clean       remove results and caches (outputs/reference stays); make distclean: the environment too'

environment: $(STAMP)

define check_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s; name another with PYTHON=..." % (sys.executable, sys.version.split()[0]))'
endef

$(STAMP): pyproject.toml
	$(check_python)
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

reproduce: $(STAMP)
	PATH="$(abspath $(VENV))/bin:$$PATH" snakemake --cores $(CORES) $(SNAKEMAKE_ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PATH="$(abspath $(VENV))/bin:$$PATH" snakemake --lint

# What these packages ask for must not change what the tests run with.
$(ZOO_STAMP): pyproject.toml
	$(check_python)
	$(PYTHON) -m venv --clear $(ZOO_VENV)
	$(ZOO_VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[zoo]'
	@touch $@

zoo: $(ZOO_STAMP)
	$(ZOO_VENV)/bin/python -m tests.zoo $(ZOO_ARGS)

clean:
	find outputs -mindepth 1 -maxdepth 1 ! -name .gitkeep ! -name reference -exec rm -rf {} +
	rm -rf .snakemake .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist dask-worker-space
	find pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(ZOO_VENV)
