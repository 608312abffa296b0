"""Starts vLLM's server in this process: default flags on CPU, and steps that make vLLM 0.32 start faster.

Each step states what it saves (2 cores, SmolLM2; docs/explanation/performance.md). None changes what the server does,
only when it is ready. Other versions of vLLM start without them.
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
from llmrun_runtime.engines.vllm.client_errors import report_client_errors
from llmrun_runtime.engines.vllm.cpu_cores import leave_to_workers, tell_vllm
from llmrun_runtime.engines.vllm.engine import VLLM, cpu_defaults
from llmrun_runtime.engines.vllm.metering import meter_vllm

SUPPORTED = "0.32."
# A model with one of these files has a processor, whose chat template takes precedence over the tokenizer's.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
CHAT_TASKS = ("generate",)
# The copies of each tokenizer that vLLM's renderer needs.
TOKENIZER_COPIES = 2
NO_LIMIT_S = 10**6
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


Fingerprint = tuple[tuple[str, int, int], ...]
"""Name, size and modification time (ns) of each of a model's small files."""


@dataclass
class Prepared:
    """State that children inherit from the fork server."""

    fast: bool = False
    """Whether the installed version of vLLM supports the steps."""
    from_forkserver: bool = False
    parser: FlexibleArgumentParser | None = None
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    """The fingerprints of the models whose tokenizers are cached, by folder."""
    copies: dict[str, list[Any]] = field(default_factory=dict)
    """Deep copies of these tokenizers, by folder."""


_prepared = Prepared()


def prepare(*, from_forkserver: bool) -> None:
    """Do what does not depend on the arguments."""
    _prepared.fast = str(vllm.__version__).startswith(SUPPORTED)
    _prepared.from_forkserver = from_forkserver
    _prepared.parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    meter_vllm()
    if _prepared.fast:
        report_client_errors()
        _check_for_processor_first()
        tokenizers.copy = SimpleNamespace(copy=copy.copy, deepcopy=_deepcopy)
        if current_platform.is_cpu():
            _allocate_kv_cache_lazily()
            _inspect_model_classes_in_process()
            if from_forkserver:
                _register_cpu_kernels_once()


def cache_model(argv: list[str]) -> None:
    """In the fork server: import this model's class and cache its tokenizer. Saves 0.4-0.7 s."""
    folder = _model_folder(argv)
    if not _prepared.fast or not folder or folder in _prepared.fingerprints:
        return
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        if current_platform.is_cpu():  # some classes query the GPU's name on import
            for architecture in config.get("architectures") or ():
                registry.ModelRegistry.models[architecture].load_model_cls()
        options = {"runner_type": "generate", "tokenizer_mode": "auto", "revision": None, "trust_remote_code": False}
        tokenizer = cached_get_tokenizer(folder, **options)
        _prepared.copies[folder] = [copy.deepcopy(copy.copy(tokenizer)) for _ in range(TOKENIZER_COPIES)]
        _prepared.fingerprints[folder] = _fingerprint(folder)
    except Exception as error:  # noqa: BLE001 - a child that needs the model reports it to its replica
        print(f"not cached: {folder}: {error!r}", flush=True)


def drop_stale(argv: list[str]) -> bool:
    """In the fork server, before a fork: clear the cache if this model's files have changed. Return whether it did."""
    folder = _model_folder(argv)
    stale = folder in _prepared.fingerprints and _prepared.fingerprints[folder] != _fingerprint(folder)
    if stale:
        clear_cache()
    return stale


def clear_cache() -> None:
    """In the fork server: drop the tokenizers of all models."""
    cached_get_tokenizer.cache_clear()
    _prepared.fingerprints.clear()
    _prepared.copies.clear()


def _deepcopy(tokenizer: Any) -> Any:
    """Return a deep copy for vLLM's pool of tokenizers: a prepared one if any is left."""
    ready = _prepared.copies.get(getattr(tokenizer, "name_or_path", ""))
    return ready.pop() if ready else copy.deepcopy(tokenizer)


def _model_folder(argv: list[str]) -> str:
    return argv[argv.index("--model") + 1] if "--model" in argv[:-1] else ""


def _fingerprint(folder: str) -> Fingerprint:
    files = sorted(file for pattern in SMALL_FILES for file in Path(folder).glob(pattern))
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat()))


def run(argv: list[str]) -> None:
    """Serve until SIGTERM, or until the replica exits."""
    if not _prepared.parser:
        prepare(from_forkserver=False)
    assert _prepared.parser
    cli_env_setup()
    if current_platform.is_cpu():
        argv = argv + cpu_defaults(argv)
        # On CPU vLLM otherwise runs a single worker in its own process: one more import of torch and vLLM, a fifth of
        # the start (docs/explanation/performance.md).
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if _prepared.from_forkserver:
        plugins.plugins_loaded = False  # each process must load them: the lease is a plugin
    if _prepared.fast and current_platform.is_cpu() and (_prepared.from_forkserver or _libraries_preloaded()):
        _fork_engine_core()
    args = _prepared.parser.parse_args(argv)
    tell_vllm()
    entry.configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.headless:  # a member of a multi-node engine; member 0 serves the API
        args.api_server_count = 0
        run_headless(args)
        return
    decorate_logs("APIServer", skip_if_decorated=True)
    address, sock = setup_server(args, reuse_port=False)
    lease.notify(port=sock.getsockname()[1])
    serve = _serve if _prepared.fast else entry.run_server_worker
    uvloop.run(serve(address, sock, args))


def _register_cpu_kernels_once() -> None:
    """Replace Triton's kernels with vLLM's CPU kernels once; each engine core searches all modules otherwise.

    Saves 0.25-0.5 s.
    """
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def _inspect_model_classes_in_process() -> None:
    """Inspect a model's class in this process; vLLM starts another one. Saves 10 s, once per version of a model.

    vLLM does so because the import might initialize a GPU.
    """
    registry._run_in_subprocess = lambda inspect: inspect()


def _libraries_preloaded() -> bool:
    """Return whether this process has preloaded the libraries that vLLM preloads in engine cores."""
    preloaded = os.environ.get("LD_PRELOAD", "").split(":")
    return all(library in preloaded for library in VLLM().libraries())


def _fork_engine_core() -> None:
    """Fork the engine core, with all imports done; vLLM spawns it on CPU. Saves 8-10 s.

    vLLM does so because OpenMP reads the environment when it is loaded (LD_PRELOAD): see `_libraries_preloaded`.
    """
    platform = type(current_platform)
    original = platform.check_and_update_config

    def with_fork(cls: type, config: Any) -> None:
        original(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(with_fork)


def _check_for_processor_first() -> None:
    """Skip loading a processor for text models: vLLM loads the tokenizer again to find none. Saves 0.4-0.5 s."""
    original = renderers._try_get_processor_chat_template

    def check_first(tokenizer: Any, **kwargs: Any) -> Any:
        folder = Path(tokenizer.name_or_path)
        if folder.is_dir() and not any((folder / name).exists() for name in PROCESSORS):
            return None
        return original(tokenizer, **kwargs)

    renderers._try_get_processor_chat_template = check_first


def _allocate_kv_cache_lazily() -> None:
    """Let the kernel zero the KV cache's pages on first use. Saves 0.3-1.0 s per GiB."""
    original = gpu_model_runner.allocate_kv_cache

    def allocate(*args: Any, **kwargs: Any) -> Any:
        with _lazy_zeros():
            return original(*args, **kwargs)

    gpu_model_runner.allocate_kv_cache = allocate


@contextlib.contextmanager
def _lazy_zeros() -> Iterator[None]:
    zeros = torch.zeros

    def lazy_zeros(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if not size:
            return zeros(size, dtype=dtype, device=device)
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype)

    torch.zeros = lazy_zeros
    try:
        yield
    finally:
        torch.zeros = zeros


async def _serve(address: str, sock: socket.socket, args: Namespace) -> None:
    """Run vLLM's `run_server_worker`, but start the engine core first, in parallel with tokenizer and routes.

    Saves 0.6-0.8 s. If the core fails, the cause is in the log and this process exits.
    """
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if config.parallel_config.data_parallel_size > 1 or args.tool_parser_plugin or args.reasoning_parser_plugin:
        await entry.run_server_worker(address, sock, args)
        return
    # vLLM's limit would include loading the weights; the replica limits the whole start (LLMRUN_START_TIMEOUT).
    core_client.VLLM_ENGINE_READY_TIMEOUT_S = NO_LIMIT_S
    listeners = bind_engine_zmq_listeners(config)
    log_stats = not engine_args.disable_log_stats
    starting = launch_core_engines(config, Executor.get_class(config), log_stats, listeners.addresses)
    launch = starting.__enter__()
    waiter = threading.Thread(target=_wait_for_core, args=(starting,), name="llmrun-core", daemon=True)
    waiter.start()
    model_config = config.model_config
    app = entry.build_app(args, CHAT_TASKS, model_config) if model_config.runner_type == "generate" else None
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
    waiter.join()
    llm.engine_core.resources.engine_manager = launch.engine_manager
    leave_to_workers([os.getpid(), *(process.pid for process in launch.engine_manager.processes)])
    llm.engine_core.start_engine_core_monitor()
    build = entry.build_app
    entry.build_app = lambda *args: app if app and tuple(args[1]) == CHAT_TASKS else build(*args)
    try:
        await llm.reset_mm_cache()
        shutdown = await entry.build_and_serve(llm, address, sock, args)
    finally:
        llm.shutdown(timeout=config.shutdown_timeout)
    try:
        await shutdown
    finally:
        sock.close()


def _wait_for_core(starting: contextlib.AbstractContextManager[Any]) -> None:
    try:
        starting.__exit__(None, None, None)
    except BaseException as error:  # noqa: BLE001 - the main thread waits for a core that failed to start
        with contextlib.suppress(OSError):  # a full disk
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
