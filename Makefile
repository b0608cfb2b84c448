# make train   from nothing to a model that speaks          make kernels   build the H100 kernels (nvcc)
# make test    prove that it all works                      make bench     time the kernel and the training step
#
# Both set up .venv themselves. With a ready interpreter, and no network: make test PYTHON=python3 VENV=
PYTHON = python3
VENV = .venv
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
RUN_READY := $(if $(VENV),$(VENV)/run-ready)
DEV_READY := $(if $(VENV),$(VENV)/dev-ready)
EXAMPLES = ThunderKittens/examples
# a CUDA device gets nanoGPT's own configuration, a CPU a smaller one
CONFIG = $(shell $(PY) -c "import torch; print('config/train_shakespeare_char' + ('' if torch.cuda.is_available() else '_cpu') + '.py')")

.PHONY: train test kernels bench lint
train: $(RUN_READY)
	$(PY) data/shakespeare_char/prepare.py
	@out=$$($(PY) -c "import runpy; print(runpy.run_path('$(CONFIG)')['out_dir'])") && \
	if [ -f $$out/trained ] && [ -f $$out/ckpt.pt ]; then echo "$$out holds a trained model; rm -r $$out trains it again"; \
	else mkdir -p $$out && { if [ -f $$out/begun ] && [ -n "$$(find $$out -name 'last-*.pt' -newer $$out/begun)" ]; \
	then more=--init_from=resume; else touch $$out/begun; fi; $(PY) train.py $(CONFIG) $$more && mv $$out/begun $$out/trained; }; fi && \
	$(PY) sample.py --out_dir=$$out --num_samples=1

test: $(DEV_READY)
	$(PY) -m pytest -q

kernels: $(RUN_READY)
	$(PY) $(EXAMPLES)/attn_causal/h100_fwd_setup.py build
	$(PY) $(EXAMPLES)/gemm_gelu/h100_gemm_setup.py build

bench: kernels
	$(PY) -m ThunderKittens.examples.attn_causal.bench
	$(PY) -m ThunderKittens.examples.gemm_gelu.bench
	$(PY) bench.py --plain=True
	$(PY) bench.py

lint: $(DEV_READY)
	$(PY) -m ruff check .

$(VENV)/run-ready: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev-ready: requirements-dev.txt $(VENV)/run-ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
