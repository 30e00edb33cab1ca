# make demo        set-up, then the main job on the embedded prior
# make test        set-up, then every test: the whole truth
# make test-oldest some of them with the oldest libraries that setup.py allows
# make test-fast   what to run while working: all but the slow ones of tests/slow.txt
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

# tests run in processes of one thread each; WORKERS=0 keeps them in pytest's own
WORKERS ?= $(shell [ $(CORES) -lt 4 ] && echo $(CORES) || echo 4)
TEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

.PHONY: setup bench-extra demo test test-fast test-oldest durations newcomer release-check known lint types docs smoke check wheel clean-run

setup: $(STAMP)

# torch first and pinned: on Linux a loose requirement would bring several gigabytes of CUDA libraries
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,server,bench]"
	touch $(STAMP)

# what a benchmark needs whose own requirements contradict ours (it wants numpy < 2, and runs with 2)
bench-extra: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps pytorch-holo==0.0.5 pooch platformdirs

# one process that uses every core; a launcher would end Ctrl+C with a traceback of its own
demo: $(STAMP)
	$(BIN)/python online/main.py --config config/ucb.py:demo $(ARGS)

smoke: $(STAMP)
	$(BIN)/python online/main.py --config config/ucb.py:smoke $(ARGS)

test: $(STAMP)
	$(TEST) $(ARGS)

test-fast: $(STAMP)
	$(TEST) -m "not slow" $(ARGS)

# the oldest releases that setup.py allows of the libraries whose interfaces move, on the pinned torch: in front of .venv,
# which has the rest (an extra may ask for more; the first bound of a name counts). What runs: every part loads whole, chains are the pipelines', surrogates, features, places, a run
OLDEST := .venv-oldest
BOUNDS := 's/.*"(transformers|diffusers|accelerate|botorch|gpytorch|peft|universal_pathlib)>=([0-9.]+)".*/\1==\2/p'
PRIORS := tests/samplers/test_diffusers_prior.py
OLDEST_TESTS := tests/samplers/test_loading.py tests/surrogates/test_models.py tests/surrogates/test_io.py \
	tests/test_vision.py tests/online/test_places.py tests/samplers/test_pipelines.py::test_renoising_is_the_lcm_pipeline \
	$(addprefix $(PRIORS)::,test_a_chain_equals_the_pipeline test_an_xl_chain_equals_the_pipeline \
	test_text_encoding_equals_the_pipeline TestEmbedded)

$(OLDEST)/.installed: $(STAMP)
	$(BIN)/python -m venv $(OLDEST)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(grep '^torch==' constraints.txt)" $$(sed -nE $(BOUNDS) setup.py | sort -u -t= -k1,1)
	touch $@

test-oldest: $(OLDEST)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses $(WORKERS) -m "not slow" $(OLDEST_TESTS)
	run=$$(mktemp -d) && OMP_NUM_THREADS=1 $(OLDEST)/bin/python online/main.py --config config/ucb.py:smoke \
		--config.run_dir=$$run/run --config.rounds=1 --config.initial_batch_size=4 --config.batch_size=2 \
		&& test -s $$run/run/summary.json && rm -rf $$run

# every command of README and docs, as somebody would run them who has just come; ARGS=--fast for a part, without pip
newcomer: $(STAMP)
	tests/newcomer.sh $(ARGS)

# what a release is: an sdist, the wheel made of it, and that wheel in a new environment, where a run of 0.1 opens
release-check: $(STAMP)
	tests/release_check.sh

# measures every test and writes tests/slow.txt anew; see tests/conftest.py
durations: $(STAMP)
	$(TEST) --renew-slow $(ARGS)

# what misspelt options are told by, without the tables: online/settings/known.json
known: $(STAMP)
	$(BIN)/python -m tiltopt.online.settings.known

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the wheel, built and unpacked into a folder: what reads code does not follow the folder mapping of an editable install
define unpacked
	rm -rf build dist $(1)
	$(BIN)/python -m build --wheel --quiet --no-isolation
	$(BIN)/python -m zipfile -e dist/*.whl $(1)
endef

# types are checked against the built wheel
types: $(STAMP)
	$(call unpacked,.types)
	cd .types && MYPYPATH=. ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p tiltopt
	rm -rf .types

check: lint types

# the documentation as a site, in site/; a warning is an error. The reference is read from the built wheel
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	$(call unpacked,.api)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	rm -rf .api
