# make demo and make test need nothing but Python 3.11+; each makes what it lacks.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Tiny models: two processes of one thread each are faster than one of two.
# The order of files is tests/conftest.py's.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test newest oldest soak crash gpu lint style types tables docs bench sanitize

demo: $(VENV)/ready
	$(RUN) examples/demo/run.py --output out/demo

# What takes one process runs beside the tests that take two, which leave a core idle at times.
test: $(VENV)/ready $(VENV)/oldest/ready style
	$(MAKE) -j 2 newest types tables docs oldest

newest: $(VENV)/ready
	$(PYTEST)

oldest: $(VENV)/oldest/ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/oldest $(RUN) -m pytest -m "oldest and not soak" $$(grep -rl "mark.oldest" tests)

# The same tests with many more cases, and many more steps (minutes).
soak: $(VENV)/ready
	LEMO_CASES=5000 $(PYTEST) tests/core/test_properties.py
	LEMO_CASES=2000 $(PYTEST) tests/storage/test_fuzz.py
	$(PYTEST) -m soak

lint: style types tables

style: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/ready
	$(RUN) -m mypy lemo_hf

tables: $(VENV)/ready
	PYTHONPATH=. $(RUN) benchmarks/table.py --check

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Commands killed, on full and read-only disks, two at once (minutes); docs/RELIABILITY.md has a tally.
crash: $(VENV)/ready
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(RUN) -m crash --kills 100 --full 25

# Needs a CUDA GPU, and two for what several share: all tests that launch something on it. Those of
# memory and of several GPUs have them to themselves.
gpu:
	OMP_NUM_THREADS=4 $(PYTHON) -m pytest -m gpu -n 4 --ignore tests/memory --ignore tests/parallel
	OMP_NUM_THREADS=4 $(PYTHON) -m pytest -m gpu tests/memory tests/parallel

# Needs a CUDA GPU; writes benchmarks/results/ and the tables.
bench:
	for what in step kernels ablation; do PYTHONPATH=. $(PYTHON) benchmarks/bench_$$what.py \
		--commit $$(git rev-parse --short HEAD) || exit 1; done
	PYTHONPATH=. $(PYTHON) benchmarks/table.py --write

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt -e ".[peft,eval,plot,test,docs]"
	$(RUN) -m pip install -q --no-deps axolotl==0.19.0 addict==2.4.0  # its pins are older than our floors
	touch $@

# The oldest transformers that is supported, put before the newest on the path.
$(VENV)/oldest/ready: $(VENV)/ready
	$(RUN) -m pip install -q --upgrade --no-deps --target $(VENV)/oldest -r tests/oldest.txt
	touch $@

# Needs a CUDA GPU: bad memory accesses and races in the kernels. Without PyTorch's caching every
# tensor is an allocation of its own, which is what makes an access beyond its end visible.
sanitize:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PYTHON) -m pytest tests/kernels -k "not reference and (dtype1 or several) and not large" || exit 1; done
