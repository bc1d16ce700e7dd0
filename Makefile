# Everything happens in .venv/ of this checkout; `make` alone says what there is.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

help:
	@echo "make demo       install, then generate, train, prune, evaluate and report into runs/demo/"
	@echo "make test       install with the pinned versions, then run the tests"
	@echo "make lint       style and types"
	@echo "make docs       the documentation site into build/site/, warnings are errors"
	@echo "make wheel      sdist and platform wheel into dist/, and the smoke test without a compiler"
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

# a file's tests share what they compiled, so a file stays in one process
test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build

# the build sees torch of .venv; the wheel is then tried where nothing can be compiled
wheel: .venv/dev
	rm -rf dist build/smoke
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip --disable-pip-version-check install -q --constraint constraints.txt \
		$$(grep '^torch==' constraints.txt) dist/lomacs_fast-*-py3-none-*.whl
	cp tests/smoke.py build/smoke/smoke.py
	cd build/smoke && PATH=$$PWD/bin LOMACS_FAST_BUILD=0 bin/python smoke.py cpp

# a library of its own in the cache, since the flags are part of its key; torch and Python themselves leak at exit
# -O1 alone fuses no multiply-adds, and tests of accuracy would judge other code than what ships
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1 \
	-fexpensive-optimizations
PRELOAD = $$($${CXX:-g++} -print-file-name=libasan.so):$$($${CXX:-g++} -print-file-name=libstdc++.so)
sanitize: .venv/dev
	LOMACS_FAST_CXXFLAGS="$(SANITIZE)" LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest tests/test_native_*.py tests/test_aeplus.py tests/test_ops_aeplus.py \
		tests/test_ops_low_rank.py -m "not slow" \
		-k "not compiled and not exported"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.PHONY: help demo test lint docs wheel sanitize clean
