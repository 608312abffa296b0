"""Calls to the agents of several nodes at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import ray

from llmrun.errors import EngineError, LLMRunError
from llmrun_runtime.node.agent import NoAgent, agent_of, agent_on
from llmrun_runtime.placement import Node

T = TypeVar("T")
log = logging.getLogger("llmrun.control")
CALL_TIMEOUT_S = 15


class AgentUnreachable(EngineError):
    """A node's agent does not respond."""


async def reachable(nodes: Sequence[Node], *, start: bool = True) -> list[Node]:
    """Return the nodes whose agents respond: Ray takes some time to notice that a node is down.

    `start`: start an agent on each node that has none.
    """
    agent = agent_on if start else agent_of
    replies = await call_each(nodes, lambda node: agent(node.id).has_pin.remote(""), None)
    return [node for node, reply in zip(nodes, replies, strict=True) if reply is not None]


async def call_each(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], default: T, timeout: float = CALL_TIMEOUT_S
) -> list[T]:
    """Return the agents' replies in the order of `nodes`; `default` for one that does not run or respond.

    Raises the LLMRunError of any agent.
    """

    async def call_one(node: Node) -> T:
        try:
            return (await call_all([node], call, timeout))[0]
        except AgentUnreachable as error:
            log.warning("%s", error)
            return default
        except NoAgent:
            return default

    return list(await asyncio.gather(*map(call_one, nodes)))


async def try_each(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], timeout: float = CALL_TIMEOUT_S
) -> list[T | LLMRunError]:
    """Return each agent's reply, or why it failed, in the order of `nodes`: one node's fault stops no other."""

    async def call_one(node: Node) -> T | LLMRunError:
        try:
            return (await call_all([node], call, timeout))[0]
        except LLMRunError as error:
            return error
        except ray.exceptions.RayTaskError as error:
            log.exception("the agent on %s failed", node.host)
            return EngineError(f"{type(error.cause).__name__}: {error.cause}")

    return list(await asyncio.gather(*map(call_one, nodes)))


async def call_all(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], timeout: float = CALL_TIMEOUT_S
) -> list[T]:
    """Return the agents' replies in the order of `nodes`. Raises the LLMRunError of any agent, or AgentUnreachable."""
    try:
        async with asyncio.timeout(timeout):
            return list(await asyncio.gather(*(call(node) for node in nodes)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMRunError):
            raise error.cause from None
        raise
    except (ray.exceptions.RayError, TimeoutError) as error:
        hosts = ", ".join(node.host for node in nodes)
        raise AgentUnreachable(f"no response from the agent on {hosts}: {type(error).__name__}") from error
