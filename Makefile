PY := .venv/bin/python
# Threads that spin while they wait slow every build on a small or shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test check gpu-packages gpu-check gpu-check-full docs kernels peers clean

setup: .venv/.ready

# torch first and by exact version: a bare `torch` would pull gigabytes of CUDA libraries.
.venv/.ready: pyproject.toml
	python3 -m venv .venv
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	.venv/bin/sdcompile build recipes/tiny-openvino-bf16.yaml
	.venv/bin/sdcompile generate artifacts/tiny-openvino-bf16.sdc "a small red circle above a large blue square on a yellow background" --seed 7 --output artifacts/demo

test: setup
	$(PY) -m pytest

check: setup
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy && .venv/bin/lint-imports
	$(PY) -m pytest -m 'not tiny and not device'

# Where there is an NVIDIA GPU: ONNX Runtime's build for it in the place of that for the CPU. Both write the same files,
# so that both go first.
gpu-packages: setup
	if command -v nvidia-smi > /dev/null && $(PY) -m pip show --quiet onnxruntime 2> /dev/null; then \
	$(PY) -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu && \
	$(PY) -m pip install --quiet --editable '.[compile-gpu]'; fi

# What the owner of an NVIDIA GPU runs, and sends artifacts/gpu-report.json of. Add '.[tensorrt]' where it is wanted.
gpu-check: gpu-packages
	.venv/bin/sdcompile doctor --selftest artifacts/gpu-report.json

# The same with SD 1.5 at full size (random weights: speed and numerics do not depend on them), beside torch on the
# GPU, for which torch must be a CUDA build. Some hours on a small machine; what is finished is kept.
gpu-check-full: gpu-packages
	test -d artifacts/sd15 || $(PY) scripts/make_full_size.py sd15 artifacts/sd15
	.venv/bin/sdcompile doctor --selftest artifacts/gpu-report.json --full --source artifacts/sd15

docs: setup
	$(PY) scripts/write_docs.py

# The PTX of sdcompile/backends/trt/kernels.cu, for whoever changes it: no GPU is needed. The compiler is old so that
# old drivers take what it makes.
kernels: .venv-kernels/.ready
	.venv-kernels/bin/python scripts/compile_kernels.py
.venv-kernels/.ready:
	python3 -m venv .venv-kernels
	.venv-kernels/bin/python -m pip install --quiet nvidia-cuda-nvrtc-cu12==12.0.140 'cuda-bindings==12.9.*'
	touch $@

# Peers that need other versions of the same libraries, for `sdcompile bench --vs optimum-intel,optimum-onnx`.
peers: .venv-peers/.ready
.venv-peers/.ready:
	python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 'optimum-intel[openvino]' optimum-onnx diffusers onnxruntime
	# It comes along, is built against another torch, breaks imports beside this one, and nothing here uses it.
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .venv-kernels .venv-peers artifacts/store artifacts/*.sdc
