PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# a worker that has no tests left takes half of another's
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n auto --dist worksteal
# what has a target of its own
APART := soak or engines or types or project
CORE := adadora_guards adadora_math adadora_model exactness layer_kinds optimizers order_and_templates peft_api \
	rank_allocator scale_cache skipped_steps state uncalled_layers
CHECKS := matrix fork upstream-check mutants engines soak

.PHONY: demo test test-core test-project check-all soak engines quality style bench peft-tests upstream-check fork \
	mutants matrix compare docs clean

demo: .venv/installed  ## fine-tune MiniLM on BBC news with AdaDoRA
	HF_HUB_OFFLINE=1 $(BIN)/python examples/news_classification/train.py

test: .venv/installed  ## the tests of behaviour (under 8 minutes on 2 cores)
	$(PYTEST) $(PARALLEL) -m 'not ($(APART))'

test-core: .venv/installed  ## those of the method, its layers, the model and the allocation of ranks (under 3 minutes)
	$(PYTEST) $(PARALLEL) -m 'not ($(APART) or overlay)' $(CORE:%=tests/test_%.py)

test-project: .venv/installed  ## the tests of benchmarks, examples, docs and packaging
	$(PYTEST) $(PARALLEL) -m project

check-all: $(CHECKS)  ## what takes too long for each change (some hours)

soak: .venv/installed  ## kill and resume a run 200 times (about 6 minutes)
	$(PYTEST) -m soak

engines: .venv/installed  ## torchrun, and FSDP2 through the Trainer with all that it can be asked for (about 3 minutes)
	$(PYTEST) -m engines

quality: .venv/installed  ## lint, check the format, and ask type checkers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -q -m types

style: .venv/installed  ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed  ## time, memory and accuracy against PEFT's AdaLoRA and DoRA (about half an hour)
	$(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/run.py --output build/benchmarks

compare: .venv/installed  ## LoRA, DoRA, AdaLoRA and AdaDoRA on real data (about five hours)
	$(INSTALL) -e '.[compare]'
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/method_comparison/compare.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/method_comparison/adaptation.py

docs: .venv/installed  ## build the site, and check its links
	$(BIN)/python -m sphinx -W --keep-going -q -c docs docs/source build/docs

peft-tests: .venv/installed  ## PEFT's own tests for AdaLoRA, with and without us (about half an hour)
	$(INSTALL) -e '.[peft-tests]'
	HF_HUB_OFFLINE=1 $(BIN)/python tests/peft_own_tests.py build/peft-tests

upstream-check: .venv/installed  ## patch PEFT's source distribution, and run its tests and ours with each patch (an hour)
	$(BIN)/python upstream/check.py build/upstream

fork: .venv/installed  ## PEFT with AdaDoRA as a branch of commits in build/fork, patches for git am, and a wheel
	$(BIN)/python upstream/fork.py build/fork

mutants: .venv/installed  ## break the code on purpose, and see that the tests notice
	$(BIN)/python upstream/mutants.py build/upstream

matrix: .venv/installed  ## the behavioural tests with other versions, on the Pythons that are here (about 30 minutes)
	$(INSTALL) nox
	$(BIN)/nox

clean:
	rm -rf .venv .nox build

# torch goes first and alone, so that nothing resolves to a build with CUDA packages
.venv/installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[demo,dev]'
	touch $@
