# All targets first install the package and its dependencies in .venv.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.done
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu

.PHONY: demo test test-slow lint format bench compare clean

demo: $(SETUP)
	$(LAUNCH) train.py configs/quickstart.yaml --resume_from_checkpoint last
	$(BIN)/python eval_gsm8k.py --model outputs/quickstart --sampler first_hitting --limit 600 --num_examples_to_print 3 --overwrite

# One process a core, each with one thread; the tests of a file stay together, as they share models.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

test: $(SETUP)
	$(PYTEST) -m "not slow"

test-slow: $(SETUP)
	$(PYTEST) -m slow

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP)
	$(BIN)/python -m hierbd3lm.benchmarks.training
	$(BIN)/python -m hierbd3lm.benchmarks.generation
	$(BIN)/python -m hierbd3lm.benchmarks.variance
	$(BIN)/python -m hierbd3lm.benchmarks.profile
	$(BIN)/python -m hierbd3lm.benchmarks.bars

compare: $(SETUP)
	$(BIN)/python -m hierbd3lm.benchmarks.compare

clean:
	rm -rf .venv outputs

$(SETUP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
