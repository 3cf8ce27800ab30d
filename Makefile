# make demo   install into .venv, compress the demo model thirteen ways, write runs/quickstart/report.html
# make test   install into .venv, run the tests
# make check  lint, formatting and types
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test check clean
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/compress run recipes/quickstart.yaml

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check compress
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
