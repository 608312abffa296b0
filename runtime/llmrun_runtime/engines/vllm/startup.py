"""Starts vLLM's server in this process: its flags' defaults on CPU, and steps that make vLLM 0.32 start sooner.

Each step says what it saves (2 cores, SmolLM2; docs/performance.md). None changes what the server does: leave one out,
and it only starts later. With another vLLM none is used.
"""

from __future__ import annotations

import contextlib
import copy
import json
import mmap
import os
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvloop
import vllm
from vllm import plugins
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import run_headless
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    propagate_flash_late_interaction,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.renderers import hf as renderers
from vllm.tokenizers import hf as tokenizers
from vllm.tokenizers.registry import cached_get_tokenizer
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import decorate_logs
from vllm.v1.engine import core_client
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor import Executor
from vllm.v1.worker import gpu_model_runner

from llmrun_runtime.engines.shim import lease
from llmrun_runtime.engines.vllm.engine import VLLM, cpu_defaults
from llmrun_runtime.engines.vllm.metering import meter_vllm

KNOWN = "0.32."
# Only a model with one of these has a processor, whose chat template goes before the tokenizer's.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
CHAT = ("generate",)
# What a warm parent keeps: tokenizers of so many models, each in as many copies as vLLM's renderer wants.
MOST_LEARNED = 8
TOKENIZERS = 2
NO_LIMIT_S = 10**6
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass
class Prepared:
    """What a warm parent leaves to its children."""

    quick: bool = False
    """Whether the steps fit the vLLM that is installed."""
    to_fork: bool = False
    parser: FlexibleArgumentParser | None = None
    learned: dict[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    """Folders whose tokenizers are kept, and how those files were."""
    copies: dict[str, list[Any]] = field(default_factory=dict)
    """Deep copies of those tokenizers, by folder."""


_prepared = Prepared()


def prepare(*, to_fork: bool) -> None:
    """Do what can be done before the arguments are known. `to_fork`: in a warm parent."""
    _prepared.quick = str(vllm.__version__).startswith(KNOWN)
    _prepared.to_fork = to_fork
    _prepared.parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    meter_vllm()
    if _prepared.quick:
        _look_for_a_processor_first()
        tokenizers.copy = SimpleNamespace(copy=copy.copy, deepcopy=_copied)
        if current_platform.is_cpu():
            _take_kv_memory_on_demand()
            _look_at_classes_here()
            if to_fork:
                _replace_kernels()


def learn(argv: list[str]) -> None:
    """In a warm parent: import the class of a model like this and keep its tokenizer. Saves 0.4-0.7 s."""
    folder = _model(argv)
    if not _prepared.quick or not folder or folder in _prepared.learned:
        return
    if len(_prepared.learned) >= MOST_LEARNED:
        _forget()
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        if current_platform.is_cpu():  # some classes ask a GPU for its name while they are imported
            for architecture in config.get("architectures") or ():
                registry.ModelRegistry.models[architecture].load_model_cls()
        said = {"runner_type": "generate", "tokenizer_mode": "auto", "revision": None, "trust_remote_code": False}
        tokenizer = cached_get_tokenizer(folder, **said)
        _prepared.copies[folder] = [copy.deepcopy(copy.copy(tokenizer)) for _ in range(TOKENIZERS)]
        _prepared.learned[folder] = _stamp(folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, a child that needs it says so to its replica
        print(f"not learned: {folder}: {error!r}", flush=True)


def recall(argv: list[str]) -> None:
    """In a warm parent, before a fork: forget tokenizers if this model's files are others now."""
    folder = _model(argv)
    if folder in _prepared.learned and _prepared.learned[folder] != _stamp(folder):
        _forget()


def _forget() -> None:
    cached_get_tokenizer.cache_clear()
    _prepared.learned.clear()
    _prepared.copies.clear()


def _copied(tokenizer: Any) -> Any:
    """A deep copy for vLLM's pool of tokenizers: one that was made before, where there is one left."""
    ready = _prepared.copies.get(getattr(tokenizer, "name_or_path", ""))
    return ready.pop() if ready else copy.deepcopy(tokenizer)


def _model(argv: list[str]) -> str:
    return argv[argv.index("--model") + 1] if "--model" in argv[:-1] else ""


def _stamp(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a model's small files."""
    files = sorted(file for pattern in SMALL_FILES for file in Path(folder).glob(pattern))
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat()))


def run(argv: list[str]) -> None:
    """Serve until SIGTERM, or until the replica is gone."""
    if not _prepared.parser:
        prepare(to_fork=False)
    assert _prepared.parser
    cli_env_setup()
    if current_platform.is_cpu():
        argv = argv + cpu_defaults(argv)
        # vLLM sends a single worker to a process of its own on CPU unless this says otherwise; it is one more
        # import of torch and vLLM, a fifth of the start (docs/performance.md).
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if _prepared.to_fork:
        plugins.plugins_loaded = False  # the lease is one: each process loads them
    if _prepared.quick and current_platform.is_cpu() and (_prepared.to_fork or _preloaded()):
        _fork_cores()
    args = _prepared.parser.parse_args(argv)
    entry.configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.headless:  # a member of an engine that spans nodes; the first one has the API
        args.api_server_count = 0
        run_headless(args)
        return
    decorate_logs("APIServer", skip_if_decorated=True)
    address, sock = setup_server(args, reuse_port=False)
    lease.tell(port=sock.getsockname()[1])
    serve = _serve if _prepared.quick else entry.run_server_worker
    uvloop.run(serve(address, sock, args))


def _replace_kernels() -> None:
    """Put vLLM's CPU kernels in place of Triton's; else each engine core searches all modules. Saves 0.25-0.5 s."""
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def _look_at_classes_here() -> None:
    """Import a model's class to see what it can do; vLLM does so in a process of its own. Saves 10 s, once a version.

    vLLM's reason is that the import might touch a GPU.
    """
    registry._run_in_subprocess = lambda look: look()


def _preloaded() -> bool:
    """Whether this process has loaded what vLLM has its engine cores load."""
    there = os.environ.get("LD_PRELOAD", "").split(":")
    return all(library in there for library in VLLM().libraries())


def _fork_cores() -> None:
    """Fork the engine core, which then has everything imported, where vLLM would spawn one (on CPU). Saves 8-10 s.

    vLLM's reason is the environment that OpenMP reads when it is loaded (LD_PRELOAD): see `_preloaded`.
    """
    platform = type(current_platform)
    original = platform.check_and_update_config

    def and_fork(cls: type, config: Any) -> None:
        original(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(and_fork)


def _look_for_a_processor_first() -> None:
    """vLLM loads the tokenizer again to find that a text model has no processor. Saves 0.4-0.5 s."""
    original = renderers._try_get_processor_chat_template

    def look_first(tokenizer: Any, **more: Any) -> Any:
        folder = Path(tokenizer.name_or_path)
        if folder.is_dir() and not any((folder / name).exists() for name in PROCESSORS):
            return None
        return original(tokenizer, **more)

    renderers._try_get_processor_chat_template = look_first


def _take_kv_memory_on_demand() -> None:
    """Leave it to the kernel to zero the pages of the KV cache, when they are first used. Saves 0.3-1.0 s a GiB."""
    original = gpu_model_runner.allocate_kv_cache

    def allocate(*args: Any, **more: Any) -> Any:
        with _zeros_on_demand():
            return original(*args, **more)

    gpu_model_runner.allocate_kv_cache = allocate


@contextlib.contextmanager
def _zeros_on_demand() -> Iterator[None]:
    zeros = torch.zeros

    def on_demand(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if not size:
            return zeros(size, dtype=dtype, device=device)
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype)

    torch.zeros = on_demand
    try:
        yield
    finally:
        torch.zeros = zeros


async def _serve(address: str, sock: socket.socket, args: Namespace) -> None:
    """vLLM's `run_server_worker` with the engine core started first, and tokenizer and routes made beside it.

    Saves 0.6-0.8 s. What fails in the core is in the log; this process then ends.
    """
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if config.parallel_config.data_parallel_size > 1 or args.tool_parser_plugin or args.reasoning_parser_plugin:
        await entry.run_server_worker(address, sock, args)
        return
    # There it would bound the load of the weights; the replica bounds the whole start (LLMRUN_START_TIMEOUT).
    core_client.VLLM_ENGINE_READY_TIMEOUT_S = NO_LIMIT_S
    listeners = bind_engine_zmq_listeners(config)
    log_stats = not engine_args.disable_log_stats
    starting = launch_core_engines(config, Executor.get_class(config), log_stats, listeners.addresses)
    launch = starting.__enter__()
    started = threading.Thread(target=_until_started, args=(starting,), name="llmrun-core", daemon=True)
    started.start()
    app = entry.build_app(args, CHAT, config.model_config) if config.model_config.runner_type == "generate" else None
    llm = AsyncLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
        client_addresses={
            "input_address": listeners.addresses.inputs[0],
            "output_address": listeners.addresses.outputs[0],
            "input_listener": listeners.inputs[0].socket,
            "output_listener": listeners.outputs[0].socket,
            "tensor_queue": launch.tensor_queue,
        },
    )
    started.join()
    llm.engine_core.resources.engine_manager = launch.engine_manager
    llm.engine_core.start_engine_core_monitor()
    build = entry.build_app
    entry.build_app = lambda *said: app if app and tuple(said[1]) == CHAT else build(*said)
    try:
        await llm.reset_mm_cache()
        end = await entry.build_and_serve(llm, address, sock, args)
    finally:
        llm.shutdown(timeout=config.shutdown_timeout)
    try:
        await end
    finally:
        sock.close()


def _until_started(starting: contextlib.AbstractContextManager[Any]) -> None:
    try:
        starting.__exit__(None, None, None)
    except BaseException as error:  # noqa: BLE001 - the main thread waits for a core that will not come
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
