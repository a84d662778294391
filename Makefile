# Everything runs in .venv, which is made here and renewed when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# More arguments for pytest: make test ARGS="-k oracle"
ARGS ?=

.PHONY: setup demo test slow matrix fuzz lint bench bench-gate bench-probe bench-onnx bench-memory bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV); on an empty machine this takes a minute or more."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py

# Two workers of one thread each; tests of one xdist_group share a worker; no test may ask a hub.
test: setup
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# Every way of running, the slow ones on smol-llava too, and what became of it as a table. With torchao installed
# everything that imports transformers warns, so this environment is one of its own.
MATRIX := build/matrix-venv
matrix:
	@test -x $(MATRIX)/bin/pip || $(PYTHON) -m venv $(MATRIX)
	@$(MATRIX)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,matrix]'
	@rm -rf build/matrix
	-@SASA_MATRIX_OUT=$(CURDIR)/build/matrix SASA_MATRIX_SLOW=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		HF_HUB_OFFLINE=1 $(MATRIX)/bin/python -m pytest -n 2 --dist loadgroup \
		tests/test_matrix_torch.py tests/test_matrix_onnx.py tests/test_matrix_smol.py
	@$(MATRIX)/bin/python tests/write_matrix.py build/matrix docs/bypass-matrix.md

# Tests that take minutes.
slow: setup
	@SASA_SLOW=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest tests/test_plain_probe.py

# More inputs and more faults than the test suite tries, and the tables of what was tried.
fuzz: setup
	@rm -rf build/records
	@SASA_RECORDS=$(CURDIR)/build/records SASA_FUZZ=400 SASA_FAULTS=all OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/test_faults.py tests/test_fuzz_*.py \
		tests/test_artefact.py tests/test_fail_closed.py tests/test_tampering.py tests/test_source_files.py
	@$(BIN)/python tests/tables.py build/records

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	@$(BIN)/python benchmarks/torch_cost.py

bench-gate: setup
	@$(BIN)/python benchmarks/gate_cost.py --out docs/gate-cost.md

bench-probe: setup
	@$(BIN)/python benchmarks/probe_options.py --out docs/probe-options.md

bench-onnx: setup
	@$(BIN)/python benchmarks/onnx_cost.py --out docs/onnx-cost.md

bench-memory: setup
	@$(BIN)/python benchmarks/export_memory.py --out docs/onnx-memory.md

# Needs an NVIDIA GPU.
bench-gpu: setup
	@$(BIN)/python benchmarks/onnx_gpu.py

# Removes what the other targets leave behind, but for $(VENV).
clean:
	rm -rf build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
