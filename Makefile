# Two commands for a new user: `make quickstart` and `make test`. Both make .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all lint format clean

# The stamp is newer than what it was installed from, so a changed pyproject reinstalls.
$(VENV)/.installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints-dev.txt -e ".[dev]"
	# An oracle of the tests. It asks for torchvision, which it does not need here and which would bring another torch.
	$(BIN)/pip install --quiet -c constraints-dev.txt --no-deps kronfluence einconv
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/iprox quickstart --output runs/quickstart

# Two workers of one thread each: threads of two workers would fight for two cores. A worker keeps to its files, whose
# fixtures are made once, until it has none left and steals.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed
	$(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist
