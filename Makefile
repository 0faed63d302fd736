# make test, make demo: everything they need is set up in .venv on first use.
#
#   PYTHON   interpreter for .venv (default python3)
#   TORCH    requirement that is installed first (default torch==2.13.0); without it pip would take the newest
#   TRANSFORMERS  requirement (default: the newest supported); the oldest supported one is transformers==5.17.0
#   ARGS     more arguments for pytest
#
# A machine that already has torch, pybind11, scikit-build-core and pytest (perhaps without a network) is used as it is:
# nothing is downloaded, and lint tools that are missing there are skipped.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
ARGS   ?=
# The tests compile the CUDA kernels for one GPU; a release for all (see CMakeLists.txt).
export KVCACHE_CUDA_ARCHS ?= 90a-real
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check install -q
# Two processes where pytest-xdist is there; asked when it is used, which is after .venv has been set up.
XDIST   = $(if $(filter 1,$(shell $(PY) -c "import importlib.util as u; print(int(bool(u.find_spec('xdist'))))")),-n 2)
HAVE   := $(shell $(PYTHON) -c "import importlib.util as u; print(int(all(u.find_spec(m) for m in ('torch', 'pybind11', 'scikit_build_core', 'pytest'))))")
CPP_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test test-slow oldest test-oldest demo lint build format clean gpu gpu-build gpu-test gpu-sanitize gpu-bench kernel-report compatibility peers bench

# Fuzzed tests draw new examples in every run: three tenths of what they try otherwise.
test: export KVCACHE_EXAMPLES ?= 30
test: build lint
	$(PY) -m pytest -q $(XDIST) -m "not slow" $(ARGS)

# The rest: the CUDA kernels in builds of the emulation that check every access to memory, tens of thousands of rows,
# whole models over the plain-torch reference. Twenty minutes on two cores.
test-slow: build
	$(PY) -m pytest -q $(XDIST) -m slow $(ARGS)

# The tests that touch transformers once more, with the oldest version that is supported: kept in a folder of its own,
# fetched once. Four minutes on two cores.
OLDEST ?= 5.17.0
OLDEST_DIR = build/transformers-$(OLDEST)
# 5.17 also needs an older huggingface_hub and what that one brings; everything else is .venv's.
OLDEST_PACKAGES = "transformers==$(OLDEST)" "huggingface-hub>=1.5,<2" httpx httpcore certifi h11 idna anyio
OLDEST_TESTS ?= tests/models $(addprefix tests/generation/test_,modes.py shared_rows.py drafts_and_forks.py \
  chunked_prefill.py random_operations.py continuous_batching.py)
test-oldest: build oldest
	PYTHONPATH="$(abspath $(OLDEST_DIR))" $(PY) -c "import transformers as t; assert t.__version__ == '$(OLDEST)', t.__file__"
	KVCACHE_OPERATIONS=500 PYTHONPATH="$(abspath $(OLDEST_DIR))" $(PY) -m pytest -q $(XDIST) -m "not reference" \
	  $(OLDEST_TESTS) $(ARGS)

oldest: $(OLDEST_DIR)/fetched
$(OLDEST_DIR)/fetched: | $(VENV)/ready
	$(PIP) --upgrade --target $(OLDEST_DIR) --no-deps $(OLDEST_PACKAGES)
	touch $@

demo: build
	$(PY) -m kvcache.cli demo

build: $(VENV)/built

ifeq ($(HAVE),1)
# The interpreter may be a venv itself, whose packages --system-site-packages does not show: hence the .pth file. Where
# Python came without ensurepip, pip is the outer one too.
$(VENV)/ready: Makefile
	$(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv --clear --without-pip --system-site-packages $(VENV) \
	  || { echo "$(NO_VENV)"; exit 1; }
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/_outer.pth"
	touch $@
$(VENV)/built: $(VENV)/ready pyproject.toml CMakeLists.txt $(CPP_SOURCES)
	PATH="$$(dirname "$$(command -v $(PYTHON))"):$$PATH" $(PIP) --no-build-isolation --no-index --no-deps -Cbuild-dir=build/make -e .
	touch $@
# lint NAME ARGUMENTS: a tool that this machine lacks is skipped.
lint = @if command -v $(1) > /dev/null; then echo "$(1) $(2)"; $(1) $(2); else echo "$(1): not installed here, skipped"; fi
lint: export PATH := $(dir $(shell command -v $(PYTHON))):$(PATH)
else
$(VENV)/ready: Makefile
	$(PYTHON) -c "import venv, ensurepip" 2> /dev/null || { echo "$(NO_VENV)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) "$(TRANSFORMERS)"
	$(PIP) "scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja
	touch $@
# Not isolated, so that the build folder can be kept and only what changed is compiled again.
$(VENV)/built: $(VENV)/ready pyproject.toml CMakeLists.txt $(CPP_SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) --no-build-isolation -Cbuild-dir=build/make -e ".[test,demo]"
	touch $@
lint = @echo "$(1) $(2)"; "$(VENV)/bin/$(1)" $(2)
endif
NO_VENV = $(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv

# Every causal LM of the installed transformers, three minutes: measured anew, table and numbers replaced.
compatibility: build
	$(PY) -m kvcache.evaluation.compatibility --again --docs docs/compatibility.md

# --- on a machine with a GPU and nvcc, also without a network. Each part ends by itself, within ten minutes, the build
# included: what is left of its time when the build is there is what it may take.
PART_SECONDS ?= 570
GPU_WORKERS  ?= 6
started := $(shell date +%s)
remaining = $(PART_SECONDS) - $$(date +%s) + $(started)
left = $$(($(remaining) > 30 ? $(remaining) : 30))
workers = $(if $(filter 1,$(shell $(PY) -c "import importlib.util as u; print(int(bool(u.find_spec('xdist'))))")),-n $(GPU_WORKERS))
gpu%: export PATH := $(PATH):/usr/local/cuda/bin

# A part that fails does not keep the others from running.
gpu:
	@failed=; for part in gpu-test gpu-sanitize gpu-bench; do $(MAKE) $$part || failed="$$failed $$part"; done; \
	  [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu-build: $(VENV)/ready
	nvidia-smi -L || { echo "make gpu needs a GPU: nvidia-smi names none"; exit 1; }
	env -u KVCACHE_CUDA_ARCHS PATH="$$(dirname "$$(command -v $(PYTHON))"):$$PATH" $(PIP) --no-build-isolation --no-deps -Cbuild-dir=build/gpu \
	  -Ccmake.define.KVCACHE_CUDA=ON -e .

gpu-test: gpu-build
	timeout $(left) $(PY) -m pytest -q -m cuda $(workers) tests $(ARGS)

gpu-sanitize: gpu-build
	$(PY) bench/sanitize.py --seconds $(left) --logs build/gpu

gpu-bench: gpu-build
	timeout $(left) $(PY) bench/gpu.py --seconds $$(($(left) - 15)) $(ARGS)

# No GPU needed: what the compiler says of every kernel, for docs/kernels.md.
kernel-report:
	$(PYTHON) bench/kernel_report.py --out bench/results/nvcc/kernels.json

# Other libraries to measure against, in folders of their own: kvpress with the transformers that it needs (its own
# Python, with .venv's torch), and what transformers' QuantizedCache needs. Fetched once; needs a network then.
PEERS = build/peers
peers: $(PEERS)/fetched
$(PEERS)/fetched: | $(VENV)/ready
	$(PY) -m venv --without-pip $(PEERS)/kvpress
	$(PY) -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
	  > "$$($(PEERS)/kvpress/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/_outer.pth"
	$(PY) -m pip --python $(PEERS)/kvpress/bin/python --disable-pip-version-check install -q kvpress==0.5.5 transformers==5.2.0
	$(PIP) --no-deps --target $(PEERS)/quantized optimum-quanto==0.2.7
	touch $@

# The end-to-end tables of docs/results.md for this machine's CPU, on an otherwise idle machine: about 20 minutes on two
# cores. With "make peers" before, kvpress and QuantizedCache take part.
E2E = $(PY) bench/end_to_end
RESULTS = bench/results/end_to_end
bench: build
	$(E2E)/overhead.py --out $(RESULTS)/overhead.json
	$(E2E)/skipdecode.py --out $(RESULTS)/skipdecode.json
	$(E2E)/tokenselect.py decode --out $(RESULTS)/tokenselect_decode.json
	$(E2E)/tokenselect.py prefill --out $(RESULTS)/tokenselect_prefill.json
	$(E2E)/h2o.py --out $(RESULTS)/h2o.json
	$(E2E)/threads.py --out $(RESULTS)/threads.json
	$(E2E)/generate.py
	$(PY) bench/tables.py

lint: build
	$(call lint,ruff,check .)
	$(call lint,ruff,format --check .)
	$(call lint,mypy,)
	$(call lint,clang-format,--dry-run -Werror $(CPP_SOURCES))

format: build
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf build $(VENV)
