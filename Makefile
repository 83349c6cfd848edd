# `make demo` and `make test` in a fresh clone do all the set-up they need; Python, a C++ compiler and make come first.
PYTHON ?= python3
BUILD ?= auto
OUT ?= out
BIN := .venv/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# A GPU machine takes the newest torch, with the Triton that this torch pins.
CONSTRAINTS := $(if $(GPU),.venv/constraints.txt,constraints.txt)
TORCH := $(if $(GPU),torch,torch triton)

# The profiler, which measures memory, otherwise writes its starts and stops between the lines of the tables.
export KINETO_LOG_LEVEL := 99

.PHONY: demo study test quick test-all minutes lint aot aot-table cuda sanitize bench report kit gpu doctor clean

demo: .venv/built
	$(BIN)/python examples/train_lm.py --out $(OUT)/demo $(DEMO)

# What label smoothing does to a classifier of images and to a language model, small: pages and pictures in out/study.
study: .venv/built
	$(BIN)/python examples/studies/digits.py --quick --out $(OUT)/study $(STUDY)
	$(BIN)/python examples/studies/text.py --quick --out $(OUT)/study $(STUDY)

# One process for each core. `test` thins what is emulated (tests/covering.py), `test-all` runs whole products, `quick` is
# for the loop of edit and run: the reference and the compiled CPU kernels, nothing emulated, no processes, no compilers.
SUITE = $(BIN)/python -m pytest tests -n auto --dist worksteal --junitxml=$(OUT)/$@$(if $(filter off,$(BUILD)),-off).xml
test test-all: .venv/built
	$(BIN)/python -m labelsmooth_kernels
	$(if $(filter off,$(BUILD)),,$(BIN)/python tests/cuda_shim/build.py)
	$(SUITE) $(if $(filter test-all,$@),--whole) $(PYTEST)

quick: .venv/built
	$(SUITE) --quick -q $(PYTEST)

# Minutes per file of the last `make test`, and how much of the whole products it covers.
minutes: .venv/built
	$(BIN)/python tests/measure.py minutes $(OUT)/test.xml
	$(BIN)/python tests/measure.py pairs

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict labelsmooth_kernels tests/typing
	$(BIN)/basedpyright --project pyproject.toml --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/* bench/*.c bench/prototypes/*.cu tests/cuda_shim/*.h tests/cuda_shim/*.cpp)

# The machine code of every Triton kernel on sm_80, sm_90 and sm_100, without a GPU, with both ends of the supported range
# of Triton. Compiled are the kernels that tests/aot_table.csv lacks, which aot-table adds, and a tenth of the others.
# Then every kernel is launched on a stand-in for the driver of four GPUs, as tests/launches.csv says.
aot: .venv/deps .venv/triton36/triton
	$(BIN)/python tests/aot_check.py $(AOT)
	PYTHONPATH=.venv/triton36 $(BIN)/python tests/aot_check.py $(AOT)
	$(BIN)/python tests/cuda_shim/build.py shim.so
	$(BIN)/python tests/launch_check.py $(LAUNCHES) & newest=$$!; \
	  PYTHONPATH=.venv/triton36 $(BIN)/python tests/launch_check.py $(LAUNCHES); oldest=$$?; wait $$newest && exit $$oldest

aot-table: AOT += --write
aot-table: LAUNCHES += --write
aot-table: aot

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own, through the tests of
# bad input, views and memory around tensors. Leaks are Python's own and not looked for.
sanitize: .venv/built
	rm -rf $(OUT)/sanitize
	LABELSMOOTH_BUILD=sanitize $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --target $(OUT)/sanitize .
	PYTHONPATH=$(OUT)/sanitize LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/pytest -q -n auto -p no:cacheprovider -k "cpu-cpu" \
	  tests/test_operators.py tests/test_regressions.py tests/test_drop_in.py tests/test_parity_table.py tests/test_linear.py tests/test_few_classes.py

# The CPU's figures, in ten minutes. RUN="--cases smoke --minutes 1" shows that all of it runs and that no speed is lost;
# RUN="--group logits", RUN="--out bench/results/cpu.jsonl": see `python -m bench run --help`.
bench: .venv/built
	$(BIN)/python -m bench run $(RUN)

# The pictures, a page and the README's tables, from bench/results.
report: .venv/built
	$(BIN)/python -m bench report --readme

# The CUDA extension, compiled and imported without a GPU in an environment of its own (5 GB), and its machine code.
CUDA_ARCHITECTURES ?= 7.5;8.0;9.0;10.0
cuda: .venv-cuda/deps
	TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" MAX_JOBS=2 LABELSMOOTH_BUILD=cuda PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" \
	  .venv-cuda/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd .venv-cuda && bin/python ../tests/cuda_check.py

.venv-cuda/deps: Makefile
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet torch==2.11.0 numpy "setuptools>=77" wheel ninja pybind11
	touch $@

# What a GPU machine without network is spared, made where there is no GPU (3 minutes): see bench/kit.py.
KIT_PYTHON ?= python3.12
kit: .venv-kit/deps
	.venv-kit/bin/python -m bench.kit make $(KIT)

# The torch, Triton and Python of the machine that the kit is for.
.venv-kit/deps: Makefile
	$(KIT_PYTHON) -m venv .venv-kit
	.venv-kit/bin/python -m pip install --quiet torch==2.11.0 numpy "setuptools>=77" wheel ninja pybind11 matplotlib
	touch $@

# On a machine with an NVIDIA GPU, with that machine's own Python, torch and Triton, and no network: 7½ minutes.
gpu:
	$(PYTHON) -m bench.gpu --out $(OUT)/gpu $(RUN)

doctor: .venv/built
	$(BIN)/python -m labelsmooth_kernels

.venv/deps: constraints.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	grep -v -E '^(torch|triton)==' constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) $(TORCH) setuptools wheel ninja pybind11 build
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) numpy pytest pytest-benchmark pytest-xdist hypothesis ruff mypy basedpyright clang-format matplotlib tqdm torchmetrics scikit-learn sacrebleu
	touch $@

.venv/mode-$(BUILD): .venv/deps
	rm -f .venv/mode-*
	touch $@

.venv/built: .venv/mode-$(BUILD) setup.py $(wildcard csrc/*)
	LABELSMOOTH_BUILD=$(BUILD) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

.venv/triton36/triton: .venv/deps
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/triton36 triton==3.6.0
	touch $@

clean:
	rm -rf .venv build dist *.egg-info out labelsmooth_kernels/_C*.so labelsmooth_kernels/_build_info.json
