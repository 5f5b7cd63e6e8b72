# Two commands for a new user: `make quickstart` and `make test`. Both make .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all test-oldest lint format docs dist wheel clean

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

# The site, with warnings as errors: also of links and anchors.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Build and check what is published.
dist: $(VENV)/.installed
	rm -rf build dist && $(BIN)/python -m build --quiet && $(BIN)/twine check --strict dist/*

# Install the wheel in an environment of its own, where it has to pass the quickstart. torch comes from $(VENV), as it has
# no part in this and is large.
wheel: dist
	scripts/try_wheel.sh $(BIN)/python dist/*.whl

# Tests of each part with the oldest dependencies that pyproject.toml allows. With `TORCH=` torch is the oldest too; by
# default it is the one of constraints-dev.txt, as others are large downloads.
TORCH ?= $(shell grep ^torch== constraints-dev.txt)
test-oldest: $(VENV)/.installed
	scripts/test_oldest.sh $(BIN) "$(TORCH)"

clean:
	rm -rf $(VENV) runs build dist site
