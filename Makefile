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

# Hundreds of faults, each survived without a loss; 5,000 odd inputs, each answered in a line.
faults: $(VENV)/.ready-test
	$(BIN)/python tests/faults/campaign.py

# Five processes on one folder, as on five hosts: two are killed, one sleeps, each run is finished once.
workers: $(VENV)/.ready-test
	$(BIN)/python tests/faults/workers.py

# What every launcher keeps; a grid on a Ray cluster of this machine, of which a node is killed and another joins.
cluster: $(VENV)/.ready-test
	$(PIP) -c constraints.txt -e '.[ray,slurm]'
	ABLAB_CLUSTER=1 $(BIN)/python -m pytest tests/experiments/run/test_executors.py
	$(BIN)/python tests/faults/cluster.py

# One run on several processes, each of them killed in turn, and taken up by others.
ranks: $(VENV)/.ready-test
	$(BIN)/python tests/faults/ranks.py

inputs: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/experiments/cli/test_any_input.py tests/experiments/cli/test_any_record.py \
		--hypothesis-profile=thorough --timeout=3600 -n 2

# Known flaws of what is installed, where PyPI's data can be reached.
audit: $(VENV)/.ready-test
	.ci/audit

# constraints.txt pins torch by version alone: pip takes the CPU build (+cpu) wherever an index offers one,
# for example with PIP_EXTRA_INDEX_URL set to PyTorch's CPU index.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# make HASHES=1 demo: of every package, only files whose digests stand in constraints.lock: those of PyPI, for each
# platform and Python, and the CPU build of torch that these were made beside.  A CUDA build brings libraries of its own.
ifdef HASHES
FOR_CUDA := "import importlib.metadata as m; exit(not any('nvidia' in one for one in m.requires('torch')))"
install = $(PIP) --require-hashes --no-deps -r constraints.lock \
	&& if $(BIN)/python -c $(FOR_CUDA); then $(PIP) --require-hashes --no-deps -r constraints-cuda.lock; fi \
	&& $(PIP) --no-deps --no-build-isolation -e .
else
install = $(PIP) -c constraints.txt -e '.$(1)'
endif

EXTRAS := [test,lint,docs]

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call install,[plugins])
	@touch $@

$(VENV)/.ready-test: $(READY)
	$(call install,$(EXTRAS))
	@touch $@

# The documentation, built from what the code knows; nothing is fetched.
docs: $(VENV)/.ready-test
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo "build/site/index.html; with a search:  $(BIN)/python -m http.server -d build/site"

# After a change of constraints.txt: the digests of its files.
lock: $(READY)
	.ci/lock

clean:
	rm -rf $(VENV) ablab-store build dist *.egg-info

.PHONY: demo test lint docs faults ranks workers cluster inputs audit lock clean
