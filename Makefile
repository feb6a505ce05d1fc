# Two commands for a newcomer, each complete by itself: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

EXCHANGE := .venv-exchange

.PHONY: train test test-slow test-exchange lint format clean

train: $(VENV)/.installed
	$(BIN)/python -m data_prep.fineweb --input=sample --output_dir=data/sample
	$(BIN)/python -m gpt_pretrain.main --gin_file=configs/quickstart.gin

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# Against transformers, torch and lm-evaluation-harness, which no other test may need: an environment of their own.
test-exchange: $(EXCHANGE)/.installed
	$(EXCHANGE)/bin/python -m pytest -m exchange tests/test_exchange_transformers.py tests/test_torch_data.py \
		tests/test_evaluate_harness.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@echo "Installing into $(VENV) (once; about a minute) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(EXCHANGE)/.installed: pyproject.toml setup.py constraints.txt
	@echo "Installing torch, transformers and lm_eval into $(EXCHANGE) (once; 2 GB) ..."
	$(PYTHON) -m venv $(EXCHANGE)
	$(EXCHANGE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,exchange,eval]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-aot $(EXCHANGE) *.egg-info .pytest_cache .ruff_cache
