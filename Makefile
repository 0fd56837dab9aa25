# Two commands for people: `make train` runs the main job on real text, `make test` the tests.
# Each does all its set-up in .venv the first time and starts at once afterwards.

PYTHON ?= python3
VENV   ?= .venv
RANKS  ?= 2
READY  := $(VENV)/.installed
BIN    := $(VENV)/bin
# deepspeed must not build its ops: not at installation, not at start-up.
export DS_BUILD_OPS = 0
export DS_ACCELERATOR = cpu

.PHONY: kernels train test test-slow test-gpu lint bench bench-gpu plan clean

# What changed in csrc/ is compiled; without a C++ compiler it says so and torch serves every op.
kernels: $(READY)
	$(BIN)/python csrc/build.py

train: kernels
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc-per-node $(RANKS) launch/train.py recipe=m32 $(ARGS)

test: kernels
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -m "not slow" --durations 15 $(ARGS)

test-slow: kernels
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -m slow --timeout 1200 --durations 25 $(ARGS)

# With a torch for CUDA in .venv; without a device the tests skip themselves.
test-gpu: kernels
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -m "gpu or multi_gpu" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

plan: $(READY)
	$(BIN)/ptm plan recipe=m32 $(ARGS)

bench: kernels
	$(BIN)/ptm bench router $(ARGS)

# States on the device, in memory, and in memory and on a disk, in turns.
bench-gpu: kernels
	$(BIN)/ptm bench tiers $(ARGS)

# torch comes first and pinned: a bare `torch` pulls gigabytes of CUDA on a machine that has none.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build ptm/kernels/*.so *.egg-info .pytest_cache .ruff_cache .hypothesis
