# make run    set up once, then write a story with the embedded model
# make test   set up once, then every test, the native ones on a sanitizer build too
# make bench  measure edgeinfer against stock llama.cpp in memory cgroups (needs root)

PYTHON  ?= python3
VENV    := .venv
PROMPT  ?= Once upon a time
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.edgeinfer-installed

.PHONY: run test bench sanitize setup clean

run: $(STAMP)
	$(VENV)/bin/edgeinfer run -p "$(PROMPT)"

# In processes of their own: what a process holds counts against its budgets, and the exporters bring in PyTorch.
test: $(STAMP)
	$(VENV)/bin/pytest --ignore=tests/exporters --ignore=tests/onnx_engine --ignore=tests/onnx_run
	$(VENV)/bin/pytest tests/onnx_engine tests/onnx_run
	$(VENV)/bin/pytest tests/exporters
	$(MAKE) --no-print-directory sanitize

bench: $(STAMP)
	$(PY) -m benchmarks.run $(BENCH)

setup: $(STAMP)

$(PY):
	$(PYTHON) -m venv $(VENV)

# An old pip shows nothing while it compiles, so pip comes first.
$(STAMP): pyproject.toml setup.py $(wildcard native/*.c native/*.h) | $(PY)
	@$(PY) -c "import llama_cpp" 2>/dev/null || echo "edgeinfer: first set-up. llama-cpp-python is compiled" \
		"from source, which takes about 5 minutes; pip shows that it goes on."
	$(PY) -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(PY) -m pip install --disable-pip-version-check --progress-bar on -e ".[test]"
	@touch $@

# The whole package with the extension under AddressSanitizer and UndefinedBehaviorSanitizer, apart from the
# normal build. Python itself does not free everything at exit, so leaks are looked for by the tests.
SANITIZED := build/sanitize
RUNTIMES   = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libubsan.so)

sanitize: $(STAMP)
	EDGEINFER_SANITIZE=address,undefined $(PY) setup.py --quiet build \
		--build-base build/sanitize-objects --build-lib $(SANITIZED)
	EDGEINFER_SANITIZE=address,undefined PYTHONPATH=$(CURDIR)/$(SANITIZED) LD_PRELOAD="$(RUNTIMES)" \
		ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(VENV)/bin/pytest tests/native

clean:
	rm -rf build $(STAMP)
