"""Calls that block, in threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class InThread(Protocol):
    """Calls what blocks in a thread."""

    async def __call__(self, call: Callable[..., T], /, *arguments: Any) -> T:
        """Returns what the call returns."""
        ...


async def in_thread(pool: Executor, call: Callable[..., T], /, *arguments: Any) -> T:
    """Calls what blocks in a thread; if this is cancelled, when the call has ended.

    Args:
        pool: Has the thread.
        call: What blocks.
        *arguments: Its arguments.

    Returns:
        What it returns.
    """
    loop = asyncio.get_running_loop()
    running = loop.run_in_executor(pool, call, *arguments)
    # Whoever waits may leave, and leave again: the loop would complain of its failure.
    running.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        # Whoever comes next must not find it still writing.
        await asyncio.wait([running])
        raise
