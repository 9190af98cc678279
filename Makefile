# Each target sets up .venv by itself: all it needs is Python 3.10 or newer with pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip

.PHONY: demo lab test export tiny bench clean

# In float32, so that every machine writes the same.
demo: .venv/package
	$(BIN)/deepseek-lit generate --prompt "def " --max-tokens 120 --temperature 0.6 --seed 2 --dtype float32 --dequantize

lab: .venv/book
	cd notebooks && ../$(BIN)/jupyter lab 00_index.ipynb

test: .venv/test
	$(BIN)/ruff check deepseek_lit kernels tests
	$(BIN)/pytest -q -n 2 --dist loadscope --nbval notebooks tests

export: .venv/test
	$(BIN)/nbdev-export
	$(BIN)/python tests/readme.py

tiny: .venv/package
	$(BIN)/python -c "from deepseek_lit.train import make_tiny; make_tiny('deepseek_lit/tiny')"

bench: .venv/test
	$(BIN)/python tests/bench_cpu.py

clean:
	rm -rf .venv

# Some systems ship Python without ensurepip: make the environment without pip and let the system's pip, of any age, put a new one into it.
.venv/bin/python:
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip install --quiet --target "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip

.venv/package: .venv/bin/python pyproject.toml
	$(PIP) install --quiet --editable .
	touch $@

.venv/book: .venv/bin/python pyproject.toml
	$(PIP) install --quiet --editable ".[book]"
	touch $@ .venv/package

.venv/test: .venv/bin/python pyproject.toml
	$(PIP) install --quiet --editable ".[test]"
	touch $@ .venv/book .venv/package
