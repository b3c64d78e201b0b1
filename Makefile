# make train   builds the quickstart data, trains a tiny NVLM-D in two stages, evaluates it
# make test    runs the tests
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

.PHONY: install train test check format clean

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

test: install
	$(BIN)/python -m pytest -n $(NPROC) --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs data/quickstart
