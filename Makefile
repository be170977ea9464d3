# make demo        from a fresh clone to eight digits that a trained network drew
# make train-demo  train the demo's model anew, in minutes
# make test        every check; what CI runs
# make test-peers  compare with the original projects' own code

PYTHON ?= python3
VENV := .venv
DEVICE := .venv-device
BIN := $(VENV)/bin
OUT := demo/out
INSTALL := install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo train-demo test test-slow test-peers clean

# Everything: networks, training, tests.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(INSTALL) -e '.[dev]'
	touch $@

# What a device installs: NumPy, one runtime, the command line. No torch, no onnx.
$(DEVICE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEVICE)
	$(DEVICE)/bin/python -m pip $(INSTALL) -e '.[cpu]'
	touch $@

# TensorRT's Python bindings, for the test that compares our names with them. A release without a
# wheel for this Python is left out, and the test says that it was.
.bindings/.downloaded: tests/engines/bindings.txt $(VENV)/.installed
	mkdir -p .bindings
	grep '^[a-z]' $< | while read -r release; do \
		$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
			--only-binary :all: -d .bindings "$$release" || echo "no wheel of $$release here"; \
	done
	touch $@

demo: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/ddpm-deploy export demo/digits.pt -o $(OUT)/unet.onnx
	$(BIN)/ddpm-deploy build $(OUT)/unet.onnx
	$(BIN)/ddpm-deploy sample -n 8 --engine $(OUT)/unet.ort.onnx -o $(OUT)/samples --overwrite --gif
	$(BIN)/ddpm-deploy verify --engine $(OUT)/unet.ort.onnx --against demo/digits.pt -o $(OUT)/verify.html
	@echo
	@echo "eight digits:  $(OUT)/samples/grid.png"
	@echo "as they form:  $(OUT)/samples/x0.gif"
	@echo "the proof:     $(OUT)/verify.html"

train-demo: $(VENV)/.installed
	$(BIN)/ddpm-deploy train --data digits -o runs/digits --overwrite \
		--widths 'inc=24 down=48,32,16 bottom=16,16 up=32,24,24 up_middle=32,32,24 time=64' \
		--batch 128 --steps 1500 --lr 0.003 --cooldown 500 --ema 0.995
	$(BIN)/python demo/check_digits.py --engine runs/digits/ckpt.pt -n 1000 --steps 100
	@echo
	@echo "the network:   runs/digits/ckpt.pt"

test: $(VENV)/.installed $(DEVICE)/.installed .bindings/.downloaded
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(DEVICE)/bin/ddpm-deploy --help > /dev/null
	$(DEVICE)/bin/ddpm-deploy doctor
	DDPM_DEPLOY_DEVICE_PYTHON=$(CURDIR)/$(DEVICE)/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not peers"

test-slow: $(VENV)/.installed $(DEVICE)/.installed
	DDPM_DEPLOY_DEVICE_PYTHON=$(CURDIR)/$(DEVICE)/bin/python $(BIN)/pytest -m slow

# Besides what [peers] installs, other projects' code in PYTHONPATH: see CONTRIBUTING.md.
test-peers: $(VENV)/.installed
	$(BIN)/python -m pip $(INSTALL) -e '.[peers]'
	$(BIN)/pytest -m peers

clean:
	rm -rf $(VENV) $(DEVICE) .bindings $(OUT) runs .mypy_cache .pytest_cache .ruff_cache
