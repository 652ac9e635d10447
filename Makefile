# Everything runs inside $(VENV), made on first use and brought up to date when a requirements file changes.
#   make train                          the embedded data set, a small detector, minutes on a CPU
#   make train DATA=/path/to/folder     your data as the tool wrote them; further flags of train.py go into ARGS="..."
PYTHON ?= python3
VENV ?= .venv
VENV_NPU ?= .venv-npu
VENV_PEER ?= .venv-peer
DATA ?=
ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --no-compile
INSTALLED := $(VENV)/.requirements
INSTALLED_QUICKSTART := $(VENV)/.requirements-quickstart
INSTALLED_DEV := $(VENV)/.requirements-dev
INSTALLED_NPU := $(VENV_NPU)/.requirements-npu
INSTALLED_PEER := $(VENV_PEER)/.requirements-peer
BENCH_ARGS ?= --quick
BENCHMARKS := train_step loss labels post_process predict optimizer loader train_run coco_evaluation memory startup busy_machine
# Two test processes of one thread each: more only fight for cores, and a file stays in one process. The order of files
# stays, too: those with few, long tests come first.
PYTEST_ARGS := -q -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)
PYTEST_NPU := OMP_NUM_THREADS=1 $(VENV_NPU)/bin/python -m pytest $(PYTEST_ARGS) test/npu
# Of the tests that are not slow, one that hangs prints where and fails; the others go on.
HANG := -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train check test test-slow test-npu test-npu-slow bench lint environments clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

train: $(INSTALLED_QUICKSTART)  ## train on the embedded data set, or on DATA=/path/to/folder; more flags in ARGS="..."
ifeq ($(strip $(DATA)),)
	$(PY) -m effdet.data.synthetic --out data/synthetic
	$(PY) train.py --root data/synthetic --output runs/quickstart --epochs 6 $(ARGS)
else
	$(PY) train.py --root "$(DATA)" $(ARGS)
endif

check: lint  ## lint and the core of the tests, in about two minutes
	$(PYTEST) $(HANG) -m "core and not slow"

test: $(INSTALLED_DEV)  ## run the tests, without those marked slow
	$(PYTEST) $(HANG) -m "not slow"

test-slow: $(INSTALLED_DEV)  ## run only the tests marked slow
	$(PYTEST) -m slow

# torch_npu changes the process it is imported into, so it has an environment and test processes of its own. The two chips
# take different code paths in torch_npu.
test-npu: $(INSTALLED_NPU)  ## run the tests on a simulated Ascend NPU, under the real torch_npu (Linux, gcc)
	NPU_SIM_SOC=Ascend910B1 $(PYTEST_NPU) $(HANG) -m "not slow"
	NPU_SIM_SOC=Ascend910A $(PYTEST_NPU) $(HANG) -m "not slow"

test-npu-slow: $(INSTALLED_NPU)  ## run only the tests on a simulated Ascend NPU marked slow
	NPU_SIM_SOC=Ascend910A $(PYTEST_NPU) -m slow

bench: $(INSTALLED) $(INSTALLED_PEER)  ## measure against effdet 0.4.1; flags such as --device cuda in BENCH_ARGS="..."
	failed=; for name in $(BENCHMARKS); do $(PY) benchmarks/$$name.py $(BENCH_ARGS) || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

lint: $(INSTALLED_DEV)  ## check style, form and imports with ruff, types with mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

environments: $(INSTALLED_DEV) $(INSTALLED_NPU)  ## install what lint and all tests need; `make -j2` does it side by side

clean:  ## remove the environment and caches; data/, runs/ and output/ stay
	rm -rf $(VENV) $(VENV_NPU) $(VENV_PEER) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that a machine with a local build of the pinned version uses that one. torchvision is
# only imported by timm and comes without dependencies, which would ask for a second torch where the builds differ.
# Compiling all 11,000 modules would take half of an installation's time. Importing what the scripts import compiles
# those that are needed, once and for all, also where Python is told to leave no bytecode behind.
unexport PYTHONDONTWRITEBYTECODE
define make_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is " + sys.version)'
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python $(PIP_INSTALL) "$$(grep -E '^torch==' requirements.txt)"
$(1)/bin/python $(PIP_INSTALL) --no-deps "$$(grep -E '^torchvision==' requirements.txt)"
endef

$(INSTALLED): requirements.txt
	$(call make_environment,$(VENV))
	$(PY) $(PIP_INSTALL) -r requirements.txt
	$(PY) -c 'import effdet.training.trainer, effdet.commands.evaluation, effdet.commands.drawing'
	@touch $@

$(INSTALLED_QUICKSTART): $(INSTALLED) requirements-quickstart.txt
	$(PY) $(PIP_INSTALL) -r requirements-quickstart.txt
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	$(PY) $(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(INSTALLED_NPU): requirements.txt requirements-npu.txt requirements-dev.txt
	$(call make_environment,$(VENV_NPU))
	$(VENV_NPU)/bin/python $(PIP_INSTALL) -r requirements-npu.txt $$(grep -E '^pytest' requirements-dev.txt)
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(VENV_NPU)/bin/python -c 'import effdet.training.trainer, effdet.commands.evaluation, effdet.commands.drawing'
	@touch $@

$(INSTALLED_PEER): requirements.txt benchmarks/requirements-peer.txt
	$(call make_environment,$(VENV_PEER))
	$(VENV_PEER)/bin/python $(PIP_INSTALL) -r benchmarks/requirements-peer.txt
	@touch $@
