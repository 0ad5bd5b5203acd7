# make demo: a first run on a fresh machine.   make test: lint, types, import floors, suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# TORCH_INDEX=URL: where CPU-only wheels of torch are, if the default index has none of them.
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt $(INDEX)
SETTINGS := setup.cfg pyproject.toml constraints-cpu.txt

.PHONY: demo test lint types floors suite container clean

demo: $(VENV)/.installed
	$(BIN)/wsi synth demo/slides/mucosa.svs --width 8192 --height 6144 --mpp 0.5 --seed 7
	$(BIN)/wsi-run 'demo/slides/*.svs' --out demo/results
	@echo
	@echo "Look at:  demo/results/previews/mucosa.png     the slide, its glands and nuclear density"
	@echo "          demo/results/objects/mucosa.parquet  one row a nucleus, gland or lumen"
	@echo "          demo/results/reports/mucosa.json     what happened, how long it took"
	@echo "Read it:  $(BIN)/python -c \"import pandas; print(pandas.read_parquet('demo/results/objects').groupby('kind', observed=True).area_um2.describe())\""

test: lint types floors suite

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(VENV)/.installed-dev
	$(BIN)/mypy

floors: $(VENV)/.installed-dev
	$(BIN)/lint-imports

suite: $(VENV)/.installed-dev $(VENV)/snakemake/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# Builds the image and runs the demo in it, not as root; see the script for what it needs.
container:
	workflows/container/check.sh

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SETTINGS)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

# An environment of its own: Snakemake wants other versions of packages than we do.
$(VENV)/snakemake/.installed: workflows/snakemake/requirements.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)/snakemake
	$(VENV)/snakemake/bin/python -m pip install --disable-pip-version-check -q -r $<
	@touch $@

clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
