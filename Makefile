# make demo: both stages in short on real CIFAR-10, on any processor; it forecasts how long it takes
# make test: style and tests
# make reproduce MODEL=R32_C10: the chain of trainings in recipes/R32_C10.sh, hours on a CPU; SEED=1
# for another seed, SUBSET=64 to rehearse it on as few images
# Each sets up everything it needs in .venv first, but this one:
# make gpu: tests and timings on a GPU in 10 minutes (MAX_MINUTES=30 for more), without a network,
# with the Python that PYTHON names or .venv has

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := cv/demo
MODEL ?= R32_C10
MAX_MINUTES ?= 10
# the Python that was asked for, else that of .venv, else any
FOUND = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(RUN)) $(PYTHON)),$(PYTHON))

.PHONY: demo test reproduce gpu clean-demo

$(VENV)/run: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt requirements-export.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

demo: $(VENV)/run clean-demo
	$(RUN) recipes/demo.py --out $(DEMO)

clean-demo:
	rm -rf $(DEMO)

reproduce: $(VENV)/run
	PYTHON=$(RUN) sh recipes/$(MODEL).sh

gpu:
	@$(FOUND) benchmarks/gpu.py --max_minutes $(MAX_MINUTES)

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4
