"""One worker process, and what it is asked: the watchdog."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from jacserve_server.errors import ServiceError
from jacserve_server.isolation.channel import Channel, socket_pair
from jacserve_server.isolation.process import WorkerProcess
from jacserve_server.isolation.protocol import (
    NEWS,
    ORDERS,
    Failed,
    ProtocolError,
    Ready,
    Reply,
    Request,
    Start,
    Unfit,
)
from jacserve_server.isolation.regions import RegionPool
from jacserve_server.work import ProgramKey

_log = logging.getLogger(__name__)

_IDLE_BYTES = 2**29
# What has come is read before a worker is ended: the server may have been held up.
_MOST_READS = 64


class WorkerLostError(Exception):
    """The worker ended before it had answered."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long something may take.

    Attributes:
        seconds: So long.
        setting: The name of the setting that says so.
        deed: What is done meanwhile: "ran" or "was compiled".
    """

    seconds: float
    setting: str
    deed: str


@dataclass(slots=True, eq=False)
class Undertaking:
    """What a worker does for one caller, in one question or several.

    Attributes:
        function: Whose; its qualified name.
        counts: Whether it counts against the function if it ends the worker.
        deaths: How many workers have ended meanwhile.
        held_s: Seconds for which it was in hand when the last of them ended.
        verdict: Why it is not done again: it ended a worker.
    """

    function: str
    counts: bool = True
    deaths: int = 0
    held_s: float = 0.0
    verdict: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class Overdue:
    """What was over its budget.

    Attributes:
        undertaking: What it was.
        budget: Its budget.
        took_s: Seconds that it had taken.
    """

    undertaking: Undertaking
    budget: Budget
    took_s: float


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended.

    Attributes:
        cause: What became of it, such as "was killed by SIGSEGV".
        in_hand: What it was doing, the last begun first.
        overdue: What it was ended for, if it was.
    """

    cause: str
    in_hand: Sequence[Undertaking]
    overdue: Overdue | None


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """What a worker was asked, and has not answered."""

    undertaking: Undertaking
    since: float
    answer: "asyncio.Future[tuple[Reply, bytes]]"
    timer: asyncio.TimerHandle


class Connection:
    """A worker process, from its start to its end. Used from one event loop.

    Attributes:
        pid: Its process id.
        pool: The memory shared with it.
        programs: The names that programs have there, by key and place.
        is_alive: Whether it can be asked.
    """

    def __init__(
        self,
        start: Start,
        *,
        on_death: Callable[["Connection", Death], None],
        max_tail_bytes: int,
    ) -> None:
        """Starts the process.

        Args:
            start: What it is told first.
            on_death: Called when it has ended, after all that waited was told so;
                not if `close` has ended it.
            max_tail_bytes: The most bytes that may follow one of its messages.

        Raises:
            OSError: It can't be started.
        """
        self.pool = RegionPool(_IDLE_BYTES)
        self.programs: dict[tuple[ProgramKey, int], int] = {}
        self.is_alive = True
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._numbers = count()
        self._questions: dict[int, _Question] = {}
        self._greeting: asyncio.Future[Ready | Unfit] = self._loop.create_future()
        self._overdue: Overdue | None = None
        self._fault = ""
        ours, theirs = socket_pair()
        try:
            self._process = WorkerProcess(theirs, self._exited)
        except BaseException:
            ours.close()
            raise
        self.pid = self._process.pid
        self._channel = Channel(
            ours,
            on_message=self._take,
            on_closed=self._closed,
            max_tail_bytes=max_tail_bytes,
        )
        self._channel.send(ORDERS.dump_json(start))

    async def greeting(self, timeout_s: float) -> Ready | Unfit:
        """Waits until it says whether it is ready.

        Args:
            timeout_s: How long it may take.

        Raises:
            WorkerLostError: It ended before.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._greeting)
        except TimeoutError:
            self._end(f"was not ready after {timeout_s:g} s")
            return await self._greeting

    def next_id(self) -> int:
        """Returns the number of a new question."""
        return next(self._numbers)

    async def ask(
        self,
        request: Request,
        undertaking: Undertaking,
        budget: Budget,
        descriptors: Sequence[int] = (),
    ) -> tuple[Reply, bytes]:
        """Asks, and waits for the answer for as long as the budget says.

        Args:
            request: The question, with a number of `next_id`.
            undertaking: What it belongs to.
            budget: How long it may take before the worker is ended for it.
            descriptors: What goes with it.

        Returns:
            The answer and what follows it.

        Raises:
            ServiceError: It can't be done; or this has ended the worker.
            WorkerLostError: The worker has ended, for which this is not to blame, or
                not yet.
        """
        if not self.is_alive:
            raise WorkerLostError
        question = _Question(
            undertaking,
            time.monotonic(),
            self._loop.create_future(),
            self._loop.call_later(budget.seconds, self._expire, request.id, budget),
        )
        self._questions[request.id] = question
        self._channel.send(ORDERS.dump_json(request), descriptors=descriptors)
        try:
            reply, tail = await question.answer
        finally:
            question.timer.cancel()
        if isinstance(reply, Failed):
            raise reply.error
        return reply, tail

    def distrust(self, fault: ProtocolError) -> None:
        """Ends the worker, because of what it has said."""
        self._end(f"spoke nonsense: {fault}")

    def resident_bytes(self) -> int:
        """Returns the memory that it has; 0 where that can't be told."""
        return self._process.resident_bytes()

    def close(self) -> None:
        """Ends it; what it still does is lost."""
        self._on_death = lambda *_: None
        if self._questions or not self._greeting.done():
            self._process.kill()  # It would not listen.
        self._channel.close()
        self._process.close()
        self._settle("was ended")

    def _take(self, head: bytes, tail: bytes) -> None:
        news = NEWS.validate_json(head)
        if isinstance(news, Ready | Unfit):
            if self._greeting.done():
                raise ProtocolError("it greeted twice")
            self._greeting.set_result(news)
            return
        question = self._questions.pop(news.id, None)
        if question is None:
            raise ProtocolError("it answered what it was not asked")
        if not question.answer.done():
            question.answer.set_result((news, tail))

    def _expire(self, number: int, budget: Budget) -> None:
        for _ in range(_MOST_READS):
            if number not in self._questions or not self._channel.receive():
                break
        question = self._questions.get(number)
        if question is None or self._overdue is not None or self._fault:
            return
        took_s = time.monotonic() - question.since
        self._overdue = Overdue(question.undertaking, budget, took_s)
        self._end("was ended")

    def _closed(self, error: Exception | None) -> None:
        # It has ended, or will be: it can't be asked any more.
        if error is None:
            self._end("")
        else:
            self._end(f"spoke nonsense: {type(error).__name__}: {error}")

    def _end(self, fault: str) -> None:
        self._fault = self._fault or fault
        self.is_alive = False
        self._process.kill()

    def _exited(self, cause: str) -> None:
        # It may have answered before it ended.
        for _ in range(_MOST_READS):
            if not self._channel.receive():
                break
        self._channel.close()
        self._settle(self._fault or cause)

    def _settle(self, cause: str) -> None:
        """Tells all that wait, then whoever starts the next one."""
        self.is_alive = False
        self.pool.close()
        now = time.monotonic()
        questions = list(self._questions.values())
        self._questions.clear()
        # What it has not read it can't have died of.
        read = questions[:-1] if self._channel.lost_last else questions
        for question in read:
            question.undertaking.deaths += 1
            question.undertaking.held_s = now - question.since
        in_hand = [question.undertaking for question in reversed(read)]
        self._on_death(self, Death(cause, in_hand, self._overdue))
        for question in questions:
            question.timer.cancel()
            if not question.answer.done():
                error = question.undertaking.verdict or WorkerLostError(cause)
                question.answer.set_exception(error)
                # Nobody may wait for it any more, and the loop would complain.
                question.answer.exception()
        if not self._greeting.done():
            self._greeting.set_exception(WorkerLostError(cause))
            self._greeting.exception()
