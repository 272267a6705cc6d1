# `make demo` and `make test` need Python 3.11 (or later) and make; they install everything else into .venv on first use.
# Every path here is relative, so that a checkout may lie in a folder with spaces in its name (where torch's own C++ builds
# fail, which two of the tests need).

PYTHON ?= python3.11 python3
VENV := .venv
BIN := $(VENV)/bin
# Releases of Triton that the CPU backend is tested on besides the one in constraints.txt.
MATRIX := 3.6.0 3.8.0 3.9.0
MATRIX_VENVS := $(MATRIX:%=$(VENV)-matrix/%)
STAMP := $(VENV)/.installed
# Packages that tests/third_party, tests/company, tests/s3 and tests/nissa run besides, and what the site is built with. Each list
# stands there in copy once they are all there.
SITE := $(VENV)/docs/requirements.txt
PACKAGES := $(VENV)/third_party/requirements.txt $(VENV)/company/requirements.txt $(VENV)/s3/requirements.txt \
  $(VENV)/nissa/requirements.txt $(SITE)
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
# Processes that run tests side by side; 0 runs them in one. One more than there are processors, since many tests wait
# for processes of their own.
PYTEST_JOBS ?= $(shell echo $$(($$(nproc) + 1)))

# torch's OpenMP threads spin while they wait for the next parallel region. On a machine with few or shared cores they
# take the cores from the threads that have work, and everything threaded becomes many times slower.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: bench coverage help demo docs test test-gpu test-matrix lint types clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    grow a compiled kernel inside a model while it trains (DEMO_ARGS="--quick" for fewer steps)'
	@echo 'make test    lint, types and tests (PYTEST_ARGS="-k name" for some of them)'
	@echo 'make test-gpu  tests and benchmarks that need a GPU, which make test skips without one; see docs/gpu.md'
	@echo 'make test-matrix  the tests of the CPU backend on $(MATRIX) as well; results go to docs/cpu-matrix.md'
	@echo 'make bench   every benchmark, in hours (BENCH_ARGS="--quick" for minutes); figures go to build/bench'
	@echo 'make coverage  the tests again, with the lines of the package that none of them runs'
	@echo 'make docs    the documentation as a site, build/site/index.html, which needs no other host'
	@echo 'make lint    ruff: rules and format'
	@echo 'make types   mypy, strict on the package'
	@echo 'make clean   remove .venv and everything that the tools left behind'

demo: $(STAMP)
	@$(BIN)/python -m esper_triton.demo $(DEMO_ARGS)

test: lint types $(PACKAGES)
	@$(BIN)/python tests/oona/redis_server.py
	@$(BIN)/python tests/nissa/chromium.py
	@$(BIN)/python -m pytest -q -n $(PYTEST_JOBS) $(PYTEST_ARGS)

# Tracing makes everything some times slower, so a test may take longer here.
coverage: $(PACKAGES)
	@$(BIN)/python -m pytest -q -n $(PYTEST_JOBS) --timeout 600 --cov --cov-report term-missing $(PYTEST_ARGS)

# The laws, and the benches as a table. Without a GPU every one of the tests would be skipped, and that is not a success.
test-gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(\
	  f"error: torch {torch.__version__} finds no GPU; these tests need one, and a build of torch for it")'
	@$(BIN)/python -m pytest -q tests/gpu $(PYTEST_ARGS)
	@$(BIN)/python bench/kasmina.py --device cuda

# Rivals that tests/company installs are measured where they are.
bench: $(STAMP)
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

test-matrix: $(STAMP) $(MATRIX_VENVS:%=%/.installed)
	@$(BIN)/python tests/matrix.py $(VENV) $(MATRIX_VENVS) $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

# Warnings, as of a link that leads nowhere, are errors.
docs: $(SITE)
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(VENV)/docs $(BIN)/python -m mkdocs build --quiet --strict -f .mkdocs.yml
	@echo build/site/index.html

lint: $(STAMP)
	@$(BIN)/python -m ruff check --quiet --output-format concise .
	@$(BIN)/python -m ruff format --check --quiet . || { echo 'to repair: $(BIN)/python -m ruff format .' >&2; exit 1; }

types: $(STAMP)
	@$(BIN)/python -m mypy --no-error-summary

# The stamp is written last: a set-up that was cut short has none and is done again. A .venv whose pip does not run was
# cut short still earlier, and is made anew.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'error: Python 3.11 or later is needed; tried: $(PYTHON) (python3 is:' \
	      "$$(python3 --version 2>&1 | head -n 1)). Name another with: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  "$$found" -m venv --clear $(VENV) \
	    || { echo "error: $$found -m venv failed; on Debian and Ubuntu install the python3-venv package" >&2; exit 1; }; \
	fi
	@echo 'Setting up $(VENV) (once; some minutes) ...'
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev,demo,redis]'
	@touch $@

$(VENV)-matrix/%/.installed: $(STAMP)
	@echo 'Setting up $(@D) (once) ...' >&2
	@$(BIN)/python tests/matrix_venv.py $(@D) $*
	@touch $@

$(filter-out $(SITE),$(PACKAGES)): $(VENV)/%/requirements.txt: tests/%/requirements.txt $(STAMP)
	@$(BIN)/python tests/package_folder.py $<
	@touch $@

$(SITE): docs/requirements.txt $(STAMP)
	@$(BIN)/python tests/package_folder.py $<
	@touch $@

clean:
	@rm -rf $(VENV) $(VENV)-matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
