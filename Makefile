PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test soak engines quality style bench peft-tests upstream-check mutants matrix compare docs clean

demo: .venv/installed  ## fine-tune MiniLM on BBC news with AdaDoRA
	HF_HUB_OFFLINE=1 $(BIN)/python examples/news_classification/train.py

# files in the order of their names: by their numbers of tests, those with few that take long would come last
test: .venv/installed  ## all tests but PEFT's own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv/installed  ## kill and resume a run 200 times (about 6 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak

engines: .venv/installed  ## FSDP2 through the Trainer with all that it can be asked for (about 3 minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines

quality: .venv/installed  ## lint, check the format, and ask type checkers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m types

style: .venv/installed  ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed  ## time, memory and accuracy against PEFT's AdaLoRA and DoRA (about half an hour)
	$(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/run.py --output build/benchmarks

compare: .venv/installed  ## LoRA, DoRA, AdaLoRA and AdaDoRA on real data (about four hours)
	$(INSTALL) -e '.[compare]'
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/method_comparison/compare.py

docs: .venv/installed  ## build the site, and check its links
	$(BIN)/python -m sphinx -W --keep-going -q -c docs docs/source build/docs

peft-tests: .venv/installed  ## PEFT's own tests for AdaLoRA, with and without us (about half an hour)
	$(INSTALL) -e '.[peft-tests]'
	HF_HUB_OFFLINE=1 $(BIN)/python tests/peft_own_tests.py build/peft-tests

upstream-check: .venv/installed  ## patch PEFT's source distribution, and run its tests and ours with each patch (an hour)
	$(BIN)/python upstream/check.py build/upstream

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
