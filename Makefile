# make quickstart: from nothing to a leaderboard.  make test: lint, format and all tests.
# make test-cluster: sweeps through a real Slurm and a real Ray on this machine; Debian, as root.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LRA := $(BIN)/lra
QUICK := task=listops protocol=quick runs_dir=runs/quickstart

.PHONY: quickstart test test-cluster install clean

quickstart: install
	$(LRA) data $(QUICK)
	$(LRA) train -m $(QUICK) attention=softmax,cosformer
	$(LRA) train -m $(QUICK) attention=linear attention.feature=relu
	$(LRA) report --runs runs/quickstart --out results/quickstart

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-cluster: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[slurm,ray]'
	$(BIN)/python tests/cluster.py

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs/quickstart
