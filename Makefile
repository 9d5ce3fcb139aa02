# make demo: the whole method on real CIFAR-10, on a CPU, within 15 minutes
# make test: style and tests
# make reproduce MODEL=R32_C10: the chain of trainings in recipes/R32_C10.sh, hours on a CPU; SEED=1
# for another seed, SUBSET=64 to rehearse it on as few images
# Each sets up everything it needs in .venv first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# bfloat16 halves the time where the processor multiplies it in hardware, and only there
PRECISION ?= $(shell grep -qs bf16 /proc/cpuinfo && echo bf16 || echo fp32)
DEMO := cv/demo
FLAGS := --model R32_C10 --precision $(PRECISION)
SHIPPED := cv/R32_C10/stage2/ckpt_*.t7
# the plain one, on which the released recipe is at home
BASE := --base cv/R32_C10/plain/pk_E_42_A_0.922.t7

MODEL ?= R32_C10

.PHONY: demo test reproduce clean-demo

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/run clean-demo
	mkdir -p $(DEMO)
	@echo "== what comes with the repository: stage 2 after hours of training"
	$(RUN) test.py $(FLAGS) --load $(SHIPPED) --json $(DEMO)/shipped.json
	@echo "== and now in minutes: the full ResNet-32"
	$(RUN) test.py $(FLAGS) $(BASE) --json $(DEMO)/full.json
	@echo "== stage 1: curriculum learning of the policy"
	$(RUN) cl_training.py $(FLAGS) $(BASE) --cv_dir $(DEMO)/cl --subset 8000 \
		--batch_size 128 --max_epochs 15 --test_every 5 --penalty -0.5
	$(RUN) test.py $(FLAGS) $(BASE) --load $(DEMO)/cl --json $(DEMO)/stage1.json
	@echo "== stage 2: policy and ResNet together"
	$(RUN) finetune.py $(FLAGS) $(BASE) --cv_dir $(DEMO)/ft --pretrained $(DEMO)/cl/last.t7 \
		--subset 20000 --max_epochs 8 --test_every 2 --lr 5e-4 --penalty -2
	$(RUN) test.py $(FLAGS) --load $(DEMO)/ft --json $(DEMO)/stage2.json
	@$(RUN) benchmarks/summary.py shipped=$(DEMO)/shipped.json full=$(DEMO)/full.json "stage 1=$(DEMO)/stage1.json" "stage 2=$(DEMO)/stage2.json"

clean-demo:
	rm -rf $(DEMO)

reproduce: $(VENV)/run
	PYTHON=$(RUN) PRECISION=$(PRECISION) sh recipes/$(MODEL).sh

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest
