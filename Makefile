# All targets first install the package and its dependencies in .venv.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.done
TRAIN := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
	train.py configs/quickstart.yaml --per_device_train_batch_size 24 --resume_from_checkpoint last
TOKENWISE := outputs/quickstart_tokenwise

.PHONY: demo test test-slow lint format bench compare clean

# A model learns fastest with blocks of one token, whose NELBO is the exact likelihood. The second run starts from there
# with blocks of four tokens; `--backbone null` keeps the checkpoint's backbone.
demo: $(SETUP)
	$(TRAIN) --output_dir $(TOKENWISE) --block_size 1 --noisy_copies 1 --max_steps 2500
	$(TRAIN) --init_from $(TOKENWISE) --backbone null --seed 1 --noisy_copies 2 --max_steps 1800 \
		--muon_learning_rate 0.01 --learning_rate 0.001
	$(BIN)/python eval_gsm8k.py --model outputs/quickstart --sampler first_hitting --limit 600 --num_examples_to_print 3 --overwrite

test: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m "not slow"

test-slow: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow

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
