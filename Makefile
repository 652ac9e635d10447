# Everything runs inside $(VENV), made on first use and brought up to date when a requirements file changes.
#   make train                          the embedded data set, a small detector, minutes on a CPU
#   make train DATA=/path/to/coco       your data in COCO layout; further flags of train.py go into ARGS="..."
PYTHON ?= python3
VENV ?= .venv
DATA ?=
ARGS ?=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.requirements
INSTALLED_DEV := $(VENV)/.requirements-dev
# Two test processes of one thread each: more only fight for cores, and a file stays in one process.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-slow lint clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(INSTALLED)  ## train on the embedded data set, or on DATA=/path/to/coco; more flags in ARGS="..."
ifeq ($(strip $(DATA)),)
	$(PY) -m effdet.data.synthetic --out data/synthetic
	$(PY) train.py --root data/synthetic -c configs/quickstart.yaml --output runs/quickstart $(ARGS)
else
	$(PY) train.py --root "$(DATA)" -c configs/own_data.yaml $(ARGS)
endif

test: $(INSTALLED_DEV)  ## run the tests, without those marked slow
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED_DEV)  ## run only the tests marked slow
	$(PYTEST) -m slow

lint: $(INSTALLED_DEV)  ## check style and imports with ruff
	$(PY) -m ruff check .

clean:  ## remove the environment and caches; data/, runs/ and output/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that a machine with a local build of the pinned version uses that one. torchvision is
# only imported by timm and comes without dependencies, which would ask for a second torch where the builds differ.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install "$$(grep -E '^torch==' requirements.txt)"
	$(PY) -m pip install --no-deps "$$(grep -E '^torchvision==' requirements.txt)"
	$(PY) -m pip install -r requirements.txt
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	$(PY) -m pip install -r requirements-dev.txt
	@touch $@
