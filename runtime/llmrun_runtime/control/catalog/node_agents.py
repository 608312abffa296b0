"""Asking several node agents at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import ray

from llmrun.errors import EngineError, LLMRunError
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.placement import Node

T = TypeVar("T")
log = logging.getLogger("llmrun.control")
ANSWER_S = 15


class AgentUnreachable(EngineError):
    """A node's agent does not answer."""


async def alive(nodes: Sequence[Node]) -> list[Node]:
    """Those whose agents answer: Ray takes some time to notice that a node is gone."""
    said = await answers(nodes, lambda node: agent_on(node.id).has.remote(""), None)
    return [node for node, answer in zip(nodes, said, strict=True) if answer is not None]


async def answers(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], none: T, timeout: float = ANSWER_S
) -> list[T]:
    """The answers of the nodes' agents, in their order; `none` for one that does not answer: it may have just died.

    Raises the LLMRunError of one.
    """

    async def answer(node: Node) -> T:
        try:
            return (await gather_from([node], call, timeout))[0]
        except AgentUnreachable as error:
            log.warning("%s", error)
            return none

    return list(await asyncio.gather(*map(answer, nodes)))


async def gather_from(
    nodes: Sequence[Node], call: Callable[[Node], Awaitable[T]], timeout: float = ANSWER_S
) -> list[T]:
    """The answers of the nodes' agents, in their order. Raises the LLMRunError of one, or Silent."""
    try:
        async with asyncio.timeout(timeout):
            return list(await asyncio.gather(*(call(node) for node in nodes)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMRunError):
            raise error.cause from None
        raise
    except (ray.exceptions.RayError, TimeoutError) as error:
        hosts = ", ".join(node.host for node in nodes)
        raise AgentUnreachable(f"one of the nodes {hosts} does not answer: {type(error).__name__}") from error
