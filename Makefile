# make train   builds the quickstart data, trains a tiny NVLM-D in two stages, evaluates it
# make moe     trains a dense model for a while, makes a mixture of experts of it, trains and evaluates that
# make test    runs the tests; make test-all also the cases that tests/core.py leaves out
# make check   formats, lints, checks types
# Each installs what it needs into .venv first.

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/quickstart
DATA ?= data/quickstart
NPROC ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export OMP_NUM_THREADS ?= 1

.PHONY: install train moe test test-all check format clean

install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt constraints.txt setup.py tools/install.sh
	PYTHON="$(PYTHON)" tools/install.sh "$(VENV)"
	touch $@

train: install
	$(BIN)/python examples/quickstart/build_data.py --out $(DATA)
	$(BIN)/megavlm train examples/quickstart/stage1.yaml --nproc-per-node $(NPROC) checkpoint.save=$(RUNS)/stage1
	$(BIN)/megavlm train examples/quickstart/stage2.yaml --nproc-per-node $(NPROC) checkpoint.save=$(RUNS)/stage2 \
		checkpoint.pretrained_checkpoint=$(RUNS)/stage1
	$(BIN)/megavlm eval $(RUNS)/stage2 --nproc-per-node $(NPROC)

moe: install
	$(BIN)/python examples/quickstart/build_data.py --out $(DATA)
	$(BIN)/megavlm train examples/quickstart/stage1.yaml --nproc-per-node $(NPROC) checkpoint.save=$(RUNS)/stage1
	$(BIN)/megavlm train examples/moe/dense.yaml --nproc-per-node $(NPROC) \
		checkpoint.pretrained_checkpoint=$(RUNS)/stage1
	rm -rf runs/moe/upcycled
	$(BIN)/megavlm upcycle runs/moe/dense runs/moe/upcycled --num-experts 8 --top-k 2 --every 2
	$(BIN)/megavlm train examples/moe/upcycled.yaml --nproc-per-node $(NPROC) engine.expert_model_parallel_size=$(NPROC)
	$(BIN)/megavlm eval runs/moe/trained --nproc-per-node $(NPROC)

test: install
	$(BIN)/python -m pytest -n $(NPROC) --dist loadfile

test-all: install
	$(BIN)/python -m pytest -n $(NPROC) --dist loadfile --everything

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs data/quickstart
