# make bench   sets up and runs the microbenchmarks on the best device of this machine
# make test    sets up, lints and runs every test this machine can run
# make lint    format, style and type checks
#
# TORCH overrides the torch to install; where a suitable one is already importable, `pip install --no-build-isolation .`
# into that environment uses it instead of this .venv.
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
BENCH_ARGS ?= --quick
TEST_ARGS  ?=

bin := $(VENV)/bin
sources := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: bench test lint install clean

bench: install
	$(bin)/python -m bench $(BENCH_ARGS)

test: lint
	$(bin)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(bin)/mypy

install: $(VENV)/.installed

# torch, then what the build needs, then the package itself: editable, compiled in place.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install --quiet --upgrade pip
	$(bin)/pip install --quiet "$(TORCH)"
	# A CPU build of torch brings no Triton; 3.6.0 is the one whose interpreter the tests are written for.
	$(bin)/python -c "import triton" 2>/dev/null || $(bin)/pip install --quiet "triton==3.6.0"
	$(bin)/pip install --quiet "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.24" ninja
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(sources)
	$(bin)/pip install --no-build-isolation -e ".[bench,test]"
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(bin)/pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) dsa_kernels/*.so
