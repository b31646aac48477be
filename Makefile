# make demo: a verdict table, plots and an MLflow page from real training, on any machine.
# make test: every test.  make lint: ruff and mypy.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

demo: $(READY)
	$(BIN)/ablab run quickstart
	@echo "Open the runs in MLflow:  $(BIN)/ablab ui"

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready-test .types/ablab
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# The packages under their namespace, where mypy looks for them.
.types/ablab:
	mkdir -p .types
	ln -s .. .types/ablab

# constraints.txt pins torch by version alone: pip takes the CPU build (+cpu) wherever an index offers one,
# for example with PIP_EXTRA_INDEX_URL set to PyTorch's CPU index.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-test: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@

clean:
	rm -rf $(VENV) ablab-store build dist *.egg-info

.PHONY: demo test lint clean
