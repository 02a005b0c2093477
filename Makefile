# rondel: everything a developer, a user and CI run. `make demo` and `make test` need nothing but Python 3.11,
# a C compiler and the Python package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The version the tests run with. Without an NVIDIA driver the CPU build: the default build drags in gigabytes of CUDA.
TORCH  := 2.13.0
DEMO   ?= demo
ROUNDS ?= 20
WINDOWS ?= 16

.PHONY: install install-peer native test demo bench-quality bench-rotation bench-replication bench-encoders bench-hadamard lint format typecheck wheel-check fuzz clean

install: $(VENV)/.installed

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	if command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -sm)" != "Linux x86_64" ]; then \
	    $(PIP) install -q "torch==$(TORCH)"; \
	else \
	    $(PIP) install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	    { $(PIP) install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu "torch==$(TORCH)"; }; \
	fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml native/CMakeLists.txt $(wildcard native/include/*.h native/src/*.[ch] native/src/*/*.[ch])
	$(PIP) install -q -e ".[dev]"
	touch $@

# Unmodified llama.cpp as a prebuilt wheel: the peer tests compare with it.
install-peer: install
	$(PIP) install -q -e ".[peer]"

# Rebuild the C library after a change.
native: install

test: install
	$(BIN)/python -m pytest -q -n 2

demo: install
	$(BIN)/rondel build configs/demo.toml --output $(DEMO)

# Speed and weighted error of every encoder beside ggml's, on one thread.
bench-encoders: install-peer
	$(BIN)/python -m benchmarks.encoders --model tests/models/stories-4m

# Cycles an element of the Hadamard transform, and its share of a decode step at 2 bits.
bench-hadamard: install
	$(BIN)/python -m benchmarks.hadamard

# rondel's files and llama-quantize's, judged by unmodified llama.cpp; writes README's table. Long: every type, all texts.
bench-quality: install-peer
	$(BIN)/python benchmarks/quality.py --like IQ2_M,Q3_K_M --windows $(WINDOWS) --write-readme

# Rotations of every kind beside scales and nothing, by type and method; writes README's table. Long.
bench-rotation: install-peer
	$(BIN)/python benchmarks/rotation.py --windows $(WINDOWS) --write-readme

# Copies of a layer beside other uses of their bytes; writes README's table. Long.
bench-replication: install-peer
	$(BIN)/python benchmarks/replication.py --write-readme

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The rooms lie at the root but install as rondel.*: the checker sees them through links (never imported from there).
typecheck: install
	mkdir -p build/typing/rondel
	for room in cli converters quant native configs; do ln -sfn ../../../$$room build/typing/rondel/$$room; done
	$(BIN)/mypy -p rondel -p benchmarks

# What users get: the wheel in a fresh environment, tested from another folder.
wheel-check: install
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel -q --no-deps -w build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps build/wheel/*.whl
	# The dependencies come from $(VENV): a .pth file adds its packages, without its editable hook.
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > $$(build/wheel/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth
	cp -r tests build/wheel/tests
	# test_layers, test_docs and test_kernels read the sources, which a wheel does not have.
	cd build/wheel && venv/bin/python -m pytest -q -n 2 -p no:cacheprovider tests --ignore=tests/test_layers.py \
	    --ignore=tests/test_docs.py --ignore=tests/native/test_kernels.py

# Damaged files under the address sanitizer, with nothing but cc; native/fuzz/fuzz_gguf.c says how libFuzzer runs it.
fuzz: install
	mkdir -p build/fuzz
	$(BIN)/rondel export tests/models/stories-4m --type F16 --quiet --force -o build/fuzz/model.gguf
	$(CC) -g1 -O1 -std=gnu11 -Wno-psabi -fsanitize=address,undefined -DREPLAY -Inative/include -Inative/src native/fuzz/fuzz_gguf.c \
	    $$(find native/src -name '*.c' ! -name 'avx*.c') -lm -lpthread -o build/fuzz/fuzz_gguf
	FUZZ_ROUNDS=$(ROUNDS) build/fuzz/fuzz_gguf build/fuzz/model.gguf
	$(BIN)/python -m tests.native.reference build/fuzz/small.gguf
	FUZZ_ROUNDS=$$((100 * $(ROUNDS))) build/fuzz/fuzz_gguf build/fuzz/small.gguf

clean:
	rm -rf build dist $(DEMO)
