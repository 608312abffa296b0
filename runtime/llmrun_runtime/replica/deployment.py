"""The Serve deployment: a thin actor that owns one engine process.

Starts the engine, reports its state to control while it runs, and drains it before it stops.
Imports no engine. Serve never sends it a request: requests go from the ingress to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import ray

from llmrun.errors import EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun.wire import ReplicaState
from llmrun_runtime.actors import ControlClient
from llmrun_runtime.engines.base import Launch
from llmrun_runtime.engines.forkserver.prestart import adopt, prestart_socket
from llmrun_runtime.engines.process.engine_process import EngineProcess, ForkFailed
from llmrun_runtime.engines.process.start import StartedProcess
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import write_log
from llmrun_runtime.niceness import run_at_normal_priority
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.ray_internals import serve_replica_grpc_on
from llmrun_runtime.replica.drain import LINGER_S, UNRESPONSIVE_S, wait_until_drained
from llmrun_runtime.replica.multinode import RemoteMembers, free_port
from llmrun_runtime.replica.provisioner import Provisioner
from llmrun_runtime.replica.stall import StallWatch, probe_request
from llmrun_runtime.replica.unreported_counts import UnreportedCounts
from llmrun_runtime.safetensors_files import find_damaged
from llmrun_runtime.wire.replica_config import ReplicaConfig
from llmrun_runtime.wire.reports import LEASE_S, REPORT_S, ReplicaReport

log = logging.getLogger("ray.serve")
CONTROL_TIMEOUT_S = 10
# Control removes a replica that has not reported for LEASE_S, so there is time for another report.
REPORT_TIMEOUT_S = 0.4 * LEASE_S
# For `draining`, which returns after ROUTED_S at the latest.
ROUTED_TIMEOUT_S = 5
# After the drain: at most 23 s until the engine has ended, 30 s more for members on other nodes, and the last reports.
STOP_S = 70
# Serve replaces a replica after three failed health checks.
HEALTH_CHECK_S = 1


class Replica:
    """One replica of a version of a model."""

    def __init__(self, config: dict[str, Any]) -> None:
        run_at_normal_priority()
        self._config = ReplicaConfig.model_validate(config)
        self._control = ControlClient()
        self._provisioner = Provisioner(self._config, self._write_line, self._mark)
        serve_replica_grpc_on(self._provisioner.host)
        self._log = self._provisioner.log
        self._engine: EngineProcess | None = None
        self._remote_members: RemoteMembers | None = None
        self._state: ReplicaState = "starting"
        self._failed = ""
        self._moments = {"placed": time.time()}
        self._max_model_len = 0
        self._warning = ""
        # The engine's state, when it was last read, and the counts that control has not acknowledged.
        self._counts: dict[str, Any] = {}
        self._counted_at = time.monotonic()
        self._unreported = UnreportedCounts()
        self._stall = StallWatch(self._config.spec.stall_timeout, self._probe)
        loop = asyncio.get_running_loop()
        self._starting = loop.create_task(self._start())
        self._reporting = loop.create_task(self._report_periodically())

    async def check_health(self) -> None:
        """Raise EngineError if the engine failed to start or has died: Serve then replaces this replica."""
        if self._failed:
            raise EngineError(self._failed)
        for task in (self._starting, self._reporting):
            if task.done():
                task.result()

    async def __del__(self) -> None:
        """Drain: leave the ingresses' routing tables, wait until nothing is in flight, stop the engine."""
        was_ready, self._state = self._state == "ready", "draining"
        self._write_line("draining")
        unrouted = await self._call_control("draining", self._make_report(), timeout=ROUTED_TIMEOUT_S)
        if was_ready and not self._failed:
            await self._drain(0 if unrouted else LINGER_S)
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        await self._end_engine()  # it still reports: control ends replicas that are silent, and this can take 53 s
        self._reporting.cancel()
        await asyncio.gather(self._reporting, return_exceptions=True)
        self._write_line("stopped")
        await self._call_control("stopped", self._make_report())

    async def _drain(self, linger: float) -> None:
        """Return when the engine may be stopped; `linger`: see `wait_until_drained`."""
        hangs = False

        async def in_flight(leave: bool) -> int | None:
            nonlocal hangs
            if hangs or not self._engine or self._engine.ended():
                return 0
            if not await self._read_counts(leave=leave):
                return None
            if cause := self._stall.check(self._counts, time.monotonic()):
                hangs = True
                self._write_line(cause)
            return int(self._counts["in_flight"])

        if cause := await wait_until_drained(in_flight, self._config.drain_timeout - LINGER_S, linger):
            self._write_line(cause)

    async def _start(self) -> None:
        """Start the engine and report it ready; report the cause if that fails."""
        try:
            launch = await self._launch()
            prestarted = await self._take_prestarted()
            self._write_line(f"replica of {self._config.key}, on {socket.gethostname()}")
            engine = await self._start_engine_with_retry(launch, prestarted)
            self._mark("ready")
            await self._read_counts()
            self._max_model_len = await engine.max_model_len()
            self._warning = await self._find_warning(launch)
            self._state = "ready"
            await self._report()
        except LLMRunError as error:
            await self._fail_start(str(error))
        except Exception as error:
            log.exception("a replica of %s failed to start", self._config.spec.name)
            await self._fail_start(f"{type(error).__name__}: {error}")
        else:
            await self._warm_node()

    async def _find_warning(self, launch: Launch) -> str:
        """Return the engine's warning. Engines of other packages may not have one, and it must not fail a start."""
        warning = getattr(get_engine(self._config.spec.engine), "warning", None)
        if not warning:
            return ""
        try:
            return str(await asyncio.to_thread(warning, launch, self._counts.get("paths", ())))
        except Exception:
            log.exception("no warning for %s", self._config.spec.name)
            return ""

    async def _launch(self) -> Launch:
        """Place the other members of a multi-node engine, and install everything that the engine needs on this node.

        Raises LLMRunError.
        """
        member = self._provisioner.member()
        if self._config.spec.nodes == 1:
            return await self._provisioner.launch((member,))
        self._remote_members = RemoteMembers(self._config)
        members = (member, *await self._remote_members.members())
        return await self._provisioner.launch(members, port=free_port(member.host))

    async def _take_prestarted(self) -> StartedProcess | None:
        """The engine process that the node agent prestarted for this version, if any; use its log from now on."""
        socket_path = prestart_socket(Settings().root, self._provisioner.node)
        prestarted = await asyncio.to_thread(adopt, socket_path, self._config.key)
        if prestarted:
            self._log = prestarted.log
        return prestarted

    async def _start_engine_with_retry(self, launch: Launch, prestarted: StartedProcess | None) -> EngineProcess:
        """Start the engine; if a single-node engine fails because of the fork or without a cause, start it once more.

        Raises EngineError.
        """
        engine = self._engine = self._make_engine(launch, prestarted)
        try:
            await self._start_engine(engine, launch, prestarted=prestarted is not None)
        except EngineError as error:
            fork_failed = isinstance(error, ForkFailed)
            if self._remote_members or not (fork_failed or engine.unexplained()):
                raise
            self._write_line(f"{error}; retrying once")
            await engine.end()
            launch = replace(launch, forkserver=None) if fork_failed else launch
            engine = self._engine = self._make_engine(launch)
            await self._start_engine(engine, launch)
        return engine

    def _make_engine(self, launch: Launch, prestarted: StartedProcess | None = None) -> EngineProcess:
        self._unreported = UnreportedCounts()  # a new engine counts from zero
        engine = get_engine(self._config.spec.engine)
        return EngineProcess(engine, launch, prestarted, self._provisioner.adapter)

    async def _start_engine(self, engine: EngineProcess, launch: Launch, *, prestarted: bool = False) -> None:
        """Start the engine's processes and wait until the engine is ready. Raises EngineError."""
        started = time.monotonic()
        await engine.start()
        self._moments["forked"] = engine.started_at
        how = "forked from the fork server" if engine.forked else "started"
        how += " before this replica" if prestarted else ""
        self._write_line(f"engine {self._config.spec.engine} {how}, pid {engine.pid}")
        if self._remote_members:
            await self._remote_members.start(launch.members, launch.port)
            await self._remote_members.unless_failed(engine.ready(self._config.start_timeout))
        else:
            await engine.ready(self._config.start_timeout)
        self._write_line(f"engine ready after {time.monotonic() - started:.1f} s, port {engine.port}")

    async def _fail_start(self, cause: str) -> None:
        """Report to control, until control receives it, that the start failed; stop the engine.

        An engine does not name the file of weights that it could not read, so look for one.
        """
        spec = self._config.spec
        files = sorted(Path(spec.path).expanduser().glob("*")) if spec.path else []
        if damage := await asyncio.to_thread(find_damaged, files):
            cause = f"{damage} ({cause})"
        self._failed = cause
        self._write_line(f"failed to start: {cause}")
        while not await self._call_control("failed", self._make_report(), cause):
            await asyncio.sleep(REPORT_S)
        await self._end_engine()

    async def _warm_node(self) -> None:
        """Have the node agent prepare for the next replica on this node and count a cache hit of this one."""
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # this replica works without it
            agent = await asyncio.to_thread(agent_on, self._provisioner.node)
            agent.warm.remote(self._config.spec.engine)
            if self._provisioner.weights_were_cached:
                agent.count_cache_hit.remote()

    async def _end_engine(self) -> None:
        """Stop the engine's process and its remote members."""
        self._stall.stop()
        if self._engine:
            await self._engine.end()
        if self._remote_members:
            await self._remote_members.end()

    async def _report_periodically(self) -> None:
        """Report every REPORT_S until the engine has failed."""
        while not self._failed:
            if self._state == "ready" and (cause := await self._check_engine()):
                self._failed = cause  # Serve replaces this replica at its next health check
                self._write_line(cause)
                await self._call_control("stopped", self._make_report(), cause)
                await self._end_engine()
                return
            await self._report()
            await asyncio.sleep(REPORT_S)

    async def _check_engine(self) -> str:
        """Read the engine's counts; return why the engine has failed, "" if it has not."""
        engine = self._engine
        if not engine:
            return ""
        responds = await self._read_counts()
        member_failure = self._remote_members.failure if self._remote_members else ""
        if member_failure or (not responds and engine.ended()):
            return f"the engine died: {member_failure or engine.cause()}"
        now = time.monotonic()
        if responds:
            return self._stall.check(self._counts, now)
        limit = min(self._config.spec.stall_timeout or UNRESPONSIVE_S, UNRESPONSIVE_S)
        return f"the engine has not responded for {limit:g} s" if now - self._counted_at > limit else ""

    async def _probe(self, timeout: float) -> bool:
        """Ask the engine for one output; return whether it answered within `timeout` s. Raises EngineError."""
        assert self._engine
        spec = self._config.spec
        paths = get_engine(spec.engine).probe_paths
        served = paths.intersection(self._counts["paths"] or paths)  # some apps do not list their paths
        path, body = probe_request(served, spec.task, spec.name)
        self._write_line(f"no output for {self._counts['stalled_s']:.0f} s: probing the engine at {path}")
        status = await self._engine.probe(path, body, timeout)
        if status >= HTTPStatus.BAD_REQUEST:
            self._write_line(f"the engine rejected the probe with status {status}: it counts as answered")
        return status > 0

    async def _read_counts(self, *, leave: bool = False) -> bool:
        """Read the shim's counts; False if the engine does not respond.

        `leave`: the engine accepts no more requests if nothing is in flight.
        """
        try:
            if self._engine:
                ask = self._engine.leave if leave else self._engine.state
                self._counts = await ask(self._unreported.since)
                self._unreported.add(self._counts)
        except EngineError as error:
            self._write_line(str(error))
            return False
        self._counted_at = time.monotonic()
        return True

    async def _report(self) -> None:
        report = self._make_report()
        if await self._call_control("report", report, timeout=REPORT_TIMEOUT_S):
            self._unreported.acknowledge(report)

    async def _call_control(self, method: str, *args: Any, timeout: float = CONTROL_TIMEOUT_S) -> bool:
        """Call control; False while it is unavailable (the next report restores its table)."""
        try:
            await self._control.call(method, *args, timeout=timeout)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("control is unavailable: %s", type(error).__name__)
            return False
        return True

    def _make_report(self) -> ReplicaReport:
        engine, counts = self._engine, self._counts
        return ReplicaReport(
            id=self._provisioner.actor,
            model=self._config.spec.name,
            version=self._config.version,
            node=self._provisioner.node,
            host=self._provisioner.host,
            port=engine.port if engine else 0,
            link=engine.link if engine else 0,
            token=engine.token if engine else "",
            state=self._state,
            in_flight=counts.get("in_flight", 0),
            idle_s=counts.get("idle_s", 0),
            forked=engine.forked if engine else False,
            cores=engine.cores if engine else (),
            moments=self._moments,
            paths=frozenset(counts.get("paths", ())),
            max_model_len=self._max_model_len,
            warning=self._warning,
            adapters=frozenset(counts.get("adapters", ())),
            usage=self._unreported.usage(),
            paces=self._unreported.paces(),
        )

    def _mark(self, part: str) -> None:
        """Record the time at which a part of the start is complete."""
        self._moments[part] = time.time()

    def _write_line(self, text: str) -> None:
        try:
            write_log(self._log, text)
        except OSError as error:  # a full disk must not stop the replica
            log.warning("%s (cannot write its log: %s)", text, error)
