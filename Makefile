# Everything happens in .venv/ of this checkout; `make` alone says what there is.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

help:
	@echo "make demo       install, then generate, train, prune, evaluate and report into runs/demo/"
	@echo "make test       install with the pinned versions, then run the tests"
	@echo "make lint       style and types"
	@echo "make sanitize   the native library with ASan and UBSan, then its tests"
	@echo "make clean      remove .venv/ and what the tools cached"

.venv/pyvenv.cfg:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lomacs_fast needs Python 3.11 or later')"
	$(PYTHON) -m venv .venv

# torch first and by itself: the version decides which build the index serves
.venv/torch: .venv/pyvenv.cfg constraints.txt
	$(PIP) $$(grep '^torch==' constraints.txt)
	touch $@

.venv/demo: .venv/torch pyproject.toml setup.py
	$(PIP) --editable '.[all]'
	touch $@

.venv/dev: .venv/torch pyproject.toml setup.py
	$(PIP) --editable '.[dev]'
	touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/python -m lomacs_fast.demo --out runs/demo

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a library of its own in the cache, since the flags are part of its key; torch and Python themselves leak at exit
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
PRELOAD = $$($${CXX:-g++} -print-file-name=libasan.so):$$($${CXX:-g++} -print-file-name=libstdc++.so)
sanitize: .venv/dev
	LOMACS_FAST_CXXFLAGS="$(SANITIZE)" LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest tests/test_native_*.py tests/test_aeplus.py tests/test_ops_aeplus.py \
		tests/test_ops_low_rank.py -m "not slow" \
		-k "not compiled and not exported"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.PHONY: help demo test lint sanitize clean
