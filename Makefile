# Every target installs what it needs into $(VENV) first; nothing else on the machine changes, but by `make browser`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
DEMO_OUTPUT := outputs/demo

.PHONY: help install browser demo test test-fast lint format fuzz sanitize bench docs figures clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    poses of the images in examples/, drawn into $(DEMO_OUTPUT)/"
	@echo "make browser Chromium for the tests of the page, by apt-get as root, where there is none"
	@echo "make test    all tests"
	@echo "make test-fast  the tests of a daily loop, without the slow ones"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's formatting and safe fixes"
	@echo "make sanitize  the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz    many more inputs for tests/fuzz than make test tries"
	@echo "make bench   the scripts in benchmarks/"
	@echo "make docs    the documentation, into site/"
	@echo "make figures the images of docs/model.md and of the bundled checkpoint, drawn with it"
	@echo "make clean   remove $(VENV), caches and built files"

install: $(INSTALLED_DEV)

# The constraints pin every version; a bare `torch` could bring several GB of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]' --group dev
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt --group docs
	touch $@

demo: $(INSTALLED)
	$(BIN)/hpetr predict examples/*.jpg --output $(DEMO_OUTPUT)
	@echo "Look at the drawn images in $(DEMO_OUTPUT)/"

# pip brings no browser. The names are those that tests/server/test_serve_browser.py looks for. Without one, and without
# the means to install one, those tests are skipped.
browser:
	@for name in "$$HPETR_CHROMIUM" chromium chromium-browser chromium-headless-shell chrome-headless-shell google-chrome \
		google-chrome-stable; do if command -v "$$name" >/dev/null; then exit 0; fi; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium >/dev/null; then exit 0; fi; \
	echo "no Chromium here: the tests of the server's page are skipped; install one, or name it in HPETR_CHROMIUM"

# One thread a process: the two test processes would otherwise compete for the same cores.
test: $(INSTALLED_DEV) browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=25

test-fast: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Hours of inputs: HPETR_FUZZ is the share of them to try, e.g. `make fuzz HPETR_FUZZ=0.01`.
HPETR_FUZZ ?= 1
fuzz: $(INSTALLED_DEV)
	HPETR_FUZZ=$(HPETR_FUZZ) OMP_NUM_THREADS=1 $(BIN)/pytest tests/fuzz

sanitize: $(INSTALLED_DEV)
	OMP_NUM_THREADS=2 $(BIN)/python tests/model/ops/sanitize.py

bench: $(INSTALLED)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The images of docs/model.md, anew after a change of the bundled checkpoint.
figures: $(INSTALLED)
	$(BIN)/python docs/figures/make_model_figures.py
	$(BIN)/python docs/figures/make_photo_figures.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
