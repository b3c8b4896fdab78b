"""The threads that trace and compile: clients take turns at them.

What is compiled takes seconds, and can't be stopped once it has begun. So what waits is
queued by client, each may have so many waiting, and each has a budget of seconds that
is refilled with time.
"""

import asyncio
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from ipaddress import IPv6Network
from typing import Any, TypeVar
from urllib.parse import unquote

from jacserve_server.errors import ServiceError
from jacserve_server.fair_queue import FairQueue

T = TypeVar("T")

# A session has at most as many queries pending.
_MOST_WAITING = 64
_RETRY_AFTER_S = 1.0
# A budget is spent in so many seconds, and refilled in as many.
_REFILL_S = 3600.0
# Of those that nobody has drawn on lately, so many are kept before they are looked for.
_MANY_BUDGETS = 1000
_PEER = re.compile(r"(ipv[46]:.*):\d+")
# A site has so many addresses at least, and whoever is there any of them.
_IPV6_PREFIX = 64


def owner_of(client: str) -> str:
    """Returns whose programs and seconds of compiling a client's are.

    Args:
        client: An identity, or the address of a connection, or "".

    Returns:
        The identity, or the address without its port, of IPv6 the network: whoever
        connects again is still the same. "" stands for the server itself.
    """
    match = _PEER.fullmatch(client)
    if match is None:
        return client
    kind, _, address = unquote(match[1]).partition(":")
    if kind == "ipv6":
        bare = address.strip("[]").partition("%")[0]
        address = str(IPv6Network((bare, _IPV6_PREFIX), strict=False))
    return f"{kind}:{address}"


def is_owners_alone(error: BaseException) -> bool:
    """Tells whether a call has failed for whose it was: for another it may not."""
    return isinstance(error, ServiceError) and error.reason == "COMPILE_BUDGET_SPENT"


class CompileBudgets:
    """How many seconds each owner may still spend: a token bucket for each."""

    def __init__(
        self, size_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts with nothing spent.

        Args:
            size_s: The seconds that each owner may spend in an hour, and at once; 0
                for any.
            clock: The time, in seconds.
        """
        self._size_s = size_s
        self._clock = clock
        # Seconds spent and not yet refilled, and when that was so.
        self._spent: dict[str, tuple[float, float]] = {}

    def check(self, owner: str) -> None:
        """Raises ServiceError if an owner has spent all of its seconds."""
        spent_s = self._spent_by(owner)
        if not self._size_s or not owner or spent_s < self._size_s:
            return
        # So that a moment later it is not spent again.
        wait_s = 1.0 + (spent_s - self._size_s) * _REFILL_S / self._size_s
        raise ServiceError(
            "COMPILE_BUDGET_SPENT",
            f"this client has had programs compiled for {spent_s:.1f} s of late, and "
            f"this server grants {self._size_s:g} s in {_REFILL_S:g} s. Ask for shapes "
            f"that were asked for before, or try again in {wait_s:.0f} s.",
            retry_after_s=wait_s,
            spent_s=f"{spent_s:.1f}",
            compile_budget_s=self._size_s,
        )

    def spend(self, owner: str, seconds: float) -> None:
        """Takes note of seconds that an owner has spent."""
        if not self._size_s or not owner:
            return
        self._spent[owner] = self._spent_by(owner) + seconds, self._clock()
        if len(self._spent) > _MANY_BUDGETS:
            kept = {each: self._spent_by(each) for each in self._spent}
            now = self._clock()
            self._spent = {each: (s, now) for each, s in kept.items() if s}

    def _spent_by(self, owner: str) -> float:
        spent_s, at = self._spent.get(owner, (0.0, 0.0))
        refilled_s = (self._clock() - at) * self._size_s / _REFILL_S
        return max(0.0, spent_s - refilled_s)


@dataclass(slots=True, eq=False)
class _Waiting:
    owner: str
    call: Callable[[], Any]
    future: "Future[Any]" = field(default_factory=Future)
    is_queued: bool = True


_Call = tuple[_Waiting, asyncio.AbstractEventLoop]


class CompileTurns:
    """Runs what traces and compiles, in threads. Used from one event loop."""

    def __init__(self, threads: int, budgets: CompileBudgets | None = None) -> None:
        """Starts no thread yet.

        Args:
            threads: How many calls run at once.
            budgets: What the seconds of calls are taken from, and those of others,
                too, that have it; None for any number of seconds.
        """
        self._most = self._free = threads
        self._is_closed = False
        # They are kept: where memory is short, another could not be started.
        self._threads = 0
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._budgets = budgets or CompileBudgets()
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._counts: Counter[str] = Counter()

    def submit(self, owner: str, call: Callable[[], T]) -> "Future[T]":
        """Has a call run when its owner's turn comes.

        Args:
            owner: Whose it is: see `owner_of`. The server itself, "", has no limits.
            call: What to run.

        Returns:
            Its future. One that is cancelled before it runs is forgotten. It fails with
            a ServiceError where the owner has spent its budget when its turn comes.

        Raises:
            ServiceError: The owner has too many waiting, or has spent its budget.
        """
        self._budgets.check(owner)
        if owner and self._counts[owner] >= _MOST_WAITING:
            raise ServiceError(
                "QUEUE_FULL",
                f"{self._counts[owner]} programs of this client wait to be compiled, "
                f"and this server keeps {_MOST_WAITING} of each waiting. Try again in "
                f"{_RETRY_AFTER_S:g} s.",
                retry_after_s=_RETRY_AFTER_S,
                waiting=self._counts[owner],
                max_waiting=_MOST_WAITING,
            )
        waiting = _Waiting(owner, call)
        self._queue.put(owner, waiting)
        self._counts[owner] += 1
        waiting.future.add_done_callback(lambda _: self._forget(waiting))
        self._begin()
        return waiting.future

    def close(self) -> None:
        """Begins no more; what runs can't be stopped and is not waited for."""
        self._is_closed = True
        for waiting in list(self._queue.rounds()):
            waiting.future.cancel()
        for _ in range(self._threads):
            self._calls.put(None)

    def _begin(self) -> None:
        while self._free and (waiting := next(self._queue.heads(), None)):
            self._leave(waiting, is_its_turn=True)
            if self._is_closed:
                waiting.future.cancel()
            elif waiting.future.set_running_or_notify_cancel():
                try:
                    self._hand_over(waiting)
                except (ServiceError, RuntimeError) as error:
                    waiting.future.set_exception(error)

    def _hand_over(self, waiting: _Waiting) -> None:
        """Gives a call to a free thread, unless there is none or no time for it."""
        self._budgets.check(waiting.owner)
        if self._threads <= self._most - self._free:
            self._start_thread()
        self._free -= 1
        self._calls.put((waiting, asyncio.get_running_loop()))

    def _start_thread(self) -> None:
        # What never ends can't be stopped, and must not keep the process.
        thread = threading.Thread(target=self._work, name="compile", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # There is no memory for it. The others do its work, if there are others.
            if not self._threads:
                raise
        else:
            self._threads += 1

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            waiting, loop = entry
            start = time.monotonic()
            result, error = None, None
            try:
                result = waiting.call()
            except BaseException as raised:
                error = raised
            seconds = time.monotonic() - start
            try:
                # Before who waits is told, so that what it asks next knows of it.
                loop.call_soon_threadsafe(self._end, waiting.owner, seconds)
            except RuntimeError:
                return  # The loop is closed: nobody waits any more.
            if error is None:
                waiting.future.set_result(result)
            else:
                waiting.future.set_exception(error)
            # Not kept while it waits: a program may be large.
            del entry, waiting, loop, result, error

    def _end(self, owner: str, seconds: float) -> None:
        self._free += 1
        self._budgets.spend(owner, seconds)
        self._begin()

    def _forget(self, waiting: _Waiting) -> None:
        if waiting.is_queued:
            self._leave(waiting, is_its_turn=False)

    def _leave(self, waiting: _Waiting, *, is_its_turn: bool) -> None:
        leave = self._queue.take if is_its_turn else self._queue.remove
        leave(waiting.owner, waiting)
        waiting.is_queued = False
        self._counts[waiting.owner] -= 1
        if not self._counts[waiting.owner]:
            del self._counts[waiting.owner]
