# make bench   set up, build, run the main job, print its tables
# make test    set up, build, every test (C++ and Python)
# The rest is for people who work on the project.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# The environment's own cmake and ninja come first.
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONPATH := $(CURDIR)

SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h cmake/*) CMakeLists.txt
TESTS := $(wildcard csrc/tests/*)
PYTHON_SOURCES := rvsm_kernels bench python_tests setup.py csrc/fit_tl1.py
CMAKE := cmake -G Ninja -DPython3_EXECUTABLE=$(abspath $(BIN)/python)

.PHONY: bench test test-cpp test-python sanitize smoke lint format build clean

bench: build
	$(BIN)/python -m bench

test: test-cpp test-python

test-python: build
	RVSM_REQUIRE_NATIVE=1 $(BIN)/python -m pytest

# ---- set-up and build: stamps, so that a second run does nothing ----------------------------------------------------

$(VENV)/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) setuptools cmake ninja matplotlib pytest pytest-benchmark scikit-learn tqdm
	touch $@

build: build/module.stamp

build/module.stamp: $(VENV)/installed $(SOURCES)
	$(CMAKE) -S . -B build/module -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/rvsm_kernels
	cmake --build build/module
	touch $@

# ---- C++ tests ------------------------------------------------------------------------------------------------------

test-cpp: build/tests.stamp
	cd build/tests && ctest --output-on-failure

build/tests.stamp: $(VENV)/installed $(SOURCES) $(TESTS)
	$(CMAKE) -S . -B build/tests -DRVSM_MODULE=OFF -DRVSM_TESTS=ON
	cmake --build build/tests
	touch $@

# The same under AddressSanitizer and UBSan.
sanitize: $(VENV)/installed
	$(CMAKE) -S . -B build/sanitize -DRVSM_MODULE=OFF -DRVSM_TESTS=ON -DRVSM_SANITIZE=ON
	cmake --build build/sanitize
	cd build/sanitize && ctest --output-on-failure

# ---- for people who work on the project -----------------------------------------------------------------------------

smoke: build
	$(BIN)/python -m bench --smoke

$(VENV)/linters: $(VENV)/installed
	$(PIP) ruff mypy clang-format pre-commit
	touch $@

lint: $(VENV)/linters
	ruff check $(PYTHON_SOURCES)
	ruff format --check $(PYTHON_SOURCES)
	mypy
	clang-format --dry-run --Werror $(filter %.h %.cpp,$(SOURCES) $(TESTS))

format: $(VENV)/linters
	ruff check --fix $(PYTHON_SOURCES)
	ruff format $(PYTHON_SOURCES)
	clang-format -i $(filter %.h %.cpp,$(SOURCES) $(TESTS))

clean:
	rm -rf build $(VENV) rvsm_kernels/*.so
