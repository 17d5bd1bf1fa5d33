# The two commands are `make demo` and `make test`; both need only Python >= 3.11, make and a package index.
# The plain lines behind every target are in README.md and docs/install.md.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
JOBS ?= 2
# One thread for each test process: more would fight over the cores that the other processes use.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

BIN = $(VENV)/bin
STAMP = $(VENV)/.installed-for-recbole-llm

.DEFAULT_GOAL := help
.PHONY: help install demo leaderboard leaderboard-quick test test-full lint bench-quick clean distclean

help:
	@echo "make demo         train GLTA and its LightGCN on ml-100k and print both (about 3 minutes on 2 cores)"
	@echo "make leaderboard-quick  nine rows on ml-100k, tested against each other, as one page (about 15 minutes on 2 cores)"
	@echo "make leaderboard  every system of the papers' tables on ml-100k (some hours on 2 cores; goes on where it stood)"
	@echo "make test         ruff, mypy and the tests (10 to 20 minutes on 2 cores)"
	@echo "make test-full    the same with the slow tests"
	@echo "make lint         ruff and mypy only"
	@echo "make bench-quick  every benchmark in small"
	@echo "make clean        remove what tools left behind; make distclean also removes $(VENV)"

install: $(STAMP)

# RecBole first and alone: from Python 3.12 on, its pinned ray has no wheel. On 3.11 the second line brings the rest.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt recbole==1.2.1
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)
	$(BIN)/recbole-llm run --model=GLTA --dataset=ml-100k

leaderboard: $(STAMP)
	$(BIN)/recbole-llm leaderboard --suite=all --output=saved/leaderboards/all

leaderboard-quick: $(STAMP)
	$(BIN)/recbole-llm leaderboard --suite=quick --output=saved/leaderboards/quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS) --durations=10 -m "not slow"

test-full: lint
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS) --durations=10

bench-quick: $(STAMP)
	set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file --quick; done

clean:
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find recbole_llm tests benchmarks dataset -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
