PYTHON ?= python3.11
BIN := .venv/bin
EXTRAS := api,worker,rtx,embedded,examples,dev

.PHONY: help install demo test lint types imports pytest bench-service bench-quality bench-distillation bench-finetuning \
	bench-ledger bench-watchers bench-verdicts bench-foreign bench-beside chaos clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed  ## a virtual environment with everything pinned, in .venv

.venv/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Burnish needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: PyTorch and the servers are large, so this takes a few minutes"
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: install  ## one real job, end to end, on this machine: train, optimize, check, look
	$(BIN)/python examples/brain_mri/demo.py

test: install lint types imports pytest  ## everything that must hold before a change lands

lint: install
	$(BIN)/ruff check --quiet .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

pytest: install
	$(BIN)/pytest -n 2 --dist loadfile

bench-service: install  ## what the service itself costs: submits a second, time to a claim, memory
	$(BIN)/python -m benchmarks.service

bench-quality: install  ## what the stages are worth, with three seeds: size, latency and points lost (an hour or more)
	$(BIN)/python -m benchmarks.quality

bench-distillation: install  ## what a teacher is worth: the same student with it and without (an hour or more)
	$(BIN)/python -m benchmarks.distillation

bench-finetuning: install  ## fine-tuning after a prune: the default words beside twenty plain lines, five seeds
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.finetuning

bench-ledger: install  ## what the ledger costs as it fills: claims a second, pages of the list, sweeps
	$(BIN)/python -m benchmarks.ledger

bench-watchers: install  ## a thousand event streams and long polls at one api: /healthz and memory
	$(BIN)/python -m benchmarks.watchers

bench-verdicts: install  ## how often "met" is false, by simulation (about five minutes)
	$(BIN)/python -m benchmarks.verdicts

bench-foreign: install  ## networks that nobody here trained, through the service and by hand (about an hour)
	$(BIN)/python -m benchmarks.foreign

bench-beside: install  ## the demo's job beside an earlier commit's, in turns: make bench-beside COMMIT=...
	$(BIN)/python -m benchmarks.beside $(COMMIT)

chaos: install  ## ten minutes of seeded kills of everything under load, and what they cost; SEED=... repeats a run
	$(BIN)/python -m tests.faults.chaos $(if $(SEED),--seed $(SEED)) --out benchmarks/results/chaos.md

clean:  ## remove what the examples and the demo made; the virtual environment stays
	rm -rf build examples/*/build
