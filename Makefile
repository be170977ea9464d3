# make demo        from a fresh clone to eight digits that a trained network drew
# make train-demo  train the demo's model anew, in minutes
# make test        every check; what CI runs

PYTHON ?= python3
VENV := .venv
DEVICE := .venv-device
BIN := $(VENV)/bin
OUT := demo/out
INSTALL := install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo train-demo test test-slow clean

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

demo: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/ddpm-deploy export demo/digits.pt -o $(OUT)/unet.onnx
	$(BIN)/ddpm-deploy build $(OUT)/unet.onnx
	$(BIN)/ddpm-deploy sample -n 8 --engine $(OUT)/unet.ort.onnx -o $(OUT)/samples --overwrite --gif
	$(BIN)/ddpm-deploy verify --engine $(OUT)/unet.ort.onnx --against demo/digits.pt -o $(OUT)/verify.json
	@echo
	@echo "eight digits:  $(OUT)/samples/grid.png"
	@echo "as they form:  $(OUT)/samples/x0.gif"
	@echo "the report:    $(OUT)/verify.json"

test: $(VENV)/.installed $(DEVICE)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(DEVICE)/bin/ddpm-deploy --help > /dev/null
	$(DEVICE)/bin/ddpm-deploy doctor
	DDPM_DEPLOY_DEVICE_PYTHON=$(CURDIR)/$(DEVICE)/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed $(DEVICE)/.installed
	DDPM_DEPLOY_DEVICE_PYTHON=$(CURDIR)/$(DEVICE)/bin/python $(BIN)/pytest -m slow

clean:
	rm -rf $(VENV) $(DEVICE) $(OUT) runs .mypy_cache .pytest_cache .ruff_cache
