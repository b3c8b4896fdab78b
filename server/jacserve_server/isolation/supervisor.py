"""Keeps a worker running, and finds out which function has ended it.

What was over its budget is at fault, and so is what a worker that dies had alone in
hand. Where it had several, each is done again by itself, the last begun first, until
one of them ends its worker again. The others are done once more: functions are pure.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from jacserve_server.admission import shutting_down
from jacserve_server.errors import ServiceError
from jacserve_server.isolation.connection import (
    Connection,
    Death,
    Undertaking,
    WorkerLostError,
)
from jacserve_server.isolation.protocol import ProtocolError, Ready, Start, Unfit
from jacserve_server.isolation.quarantine import Quarantine

T = TypeVar("T")
_log = logging.getLogger(__name__)

# Something that was in hand as often when a worker ended is not done again.
_MOST_DEATHS = 5
# Who has lived so much longer by itself than when the worker ended did not end it.
_TRIAL_S = 1.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0


class StartError(Exception):
    """A worker can't be started; `unfit` says why, where the worker has said it."""

    def __init__(self, text: str, unfit: Unfit | None = None) -> None:
        """Keeps the particulars."""
        super().__init__(text)
        self.unfit = unfit


@dataclass(frozen=True, slots=True)
class WorkerState:
    """How a worker is.

    Attributes:
        device: Where it computes.
        process_id: Its process; 0 while it is started anew.
        start_count: How often it was started.
        last_failure: Why it last ended; "" if it never did.
        resident_bytes: Its memory; 0 where that can't be told.
        restarts: How often it was started anew, by cause.
    """

    device: str
    process_id: int
    start_count: int
    last_failure: str
    resident_bytes: int
    restarts: dict[str, int]


class Supervisor:
    """Has work done by a worker, and starts another when that has ended.

    Used from one event loop.
    """

    def __init__(
        self,
        start: Start,
        *,
        check: Callable[[Ready], None],
        quarantine: Quarantine,
        start_s: float,
        max_tail_bytes: int,
    ) -> None:
        """Starts nothing yet.

        Args:
            start: What each worker is told first.
            check: Raises RegistrationError at a worker that has other functions.
            quarantine: What functions did is counted there.
            start_s: Seconds that a worker may take to get ready.
            max_tail_bytes: The most bytes that may follow one of its messages.
        """
        self._start = start
        self._check = check
        self._quarantine = quarantine
        self._start_s = start_s
        self._max_tail_bytes = max_tail_bytes
        self._connection: Connection | None = None
        self._is_ready = False
        self._is_closed = False
        self._refusal: Callable[[], ServiceError] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._changed: set[asyncio.Future[None]] = set()
        self._suspects: list[Undertaking] = []
        self._on_trial: Undertaking | None = None
        self._device = ""
        self._starts = 0
        self._last_failure = ""
        self._restarts: Counter[str] = Counter()
        self._on_ability: Callable[[bool], None] = lambda _: None

    def when_able(self, call: Callable[[bool], None]) -> None:
        """Has a function told that no worker can be started, and that one was again."""
        self._on_ability = call

    async def open(self) -> Ready:
        """Starts the first worker.

        Returns:
            What it says of itself.

        Raises:
            StartError: It can't be started.
            RegistrationError: It has other functions.
        """
        return await self._begin()

    async def perform(
        self, undertaking: Undertaking, attempt: Callable[[Connection], Awaitable[T]]
    ) -> T:
        """Has something done, again where a worker ends meanwhile.

        Args:
            undertaking: What.
            attempt: Does it once, with a worker.

        Returns:
            What `attempt` returns.

        Raises:
            ServiceError: It can't be done, or it has ended a worker.
        """
        try:
            while True:
                connection = await self._turn(undertaking)
                try:
                    return await attempt(connection)
                except WorkerLostError as error:
                    if undertaking.deaths >= _MOST_DEATHS:
                        raise _not_done(undertaking) from error
                except ProtocolError as error:
                    undertaking.deaths += 1
                    connection.distrust(error)
                    if undertaking.deaths >= _MOST_DEATHS:
                        raise _not_done(undertaking) from error
        finally:
            self._acquit(undertaking)

    def state(self) -> WorkerState:
        """Returns how the worker is."""
        connection = self._connection
        is_there = connection is not None and self._is_ready
        return WorkerState(
            device=self._device,
            process_id=connection.pid if connection and is_there else 0,
            start_count=self._starts,
            last_failure=self._last_failure,
            resident_bytes=connection.resident_bytes() if connection else 0,
            restarts=dict(self._restarts),
        )

    def close(self) -> None:
        """Ends the worker; what it still does is lost."""
        self._is_closed = True
        self._refusal = shutting_down
        if self._starting is not None:
            self._starting.cancel()
        connection, self._connection = self._connection, None
        self._is_ready = False
        if connection is not None:
            connection.close()
        self._tell()

    async def _turn(self, undertaking: Undertaking) -> Connection:
        """Waits for a worker, and for suspects that are tried alone."""
        while True:
            if self._refusal is not None:
                raise self._refusal()
            self._quarantine.check(undertaking.function)
            connection = self._connection
            if connection is not None and self._is_ready and connection.is_alive:
                if not self._suspects:
                    return connection
                if self._on_trial is None and undertaking is self._suspects[0]:
                    self._try(undertaking)
                    return connection
            changed = asyncio.get_running_loop().create_future()
            self._changed.add(changed)
            try:
                await changed
            finally:
                self._changed.discard(changed)

    def _try(self, suspect: Undertaking) -> None:
        self._on_trial = suspect
        loop = asyncio.get_running_loop()
        loop.call_later(suspect.held_s + _TRIAL_S, self._acquit, suspect)

    def _acquit(self, undertaking: Undertaking) -> None:
        if undertaking not in self._suspects:
            return
        self._suspects.remove(undertaking)
        if self._on_trial is undertaking:
            self._on_trial = None
        self._tell()

    def _tell(self) -> None:
        for changed in self._changed:
            if not changed.done():
                changed.set_result(None)

    async def _begin(self) -> Ready:
        """Starts a worker, and waits until it is ready."""
        self._starts += 1
        self._is_ready = False
        try:
            connection = self._connection = Connection(
                self._start,
                on_death=self._died,
                max_tail_bytes=self._max_tail_bytes,
            )
        except OSError as error:
            raise StartError(error.strerror or str(error)) from error
        try:
            greeting = await connection.greeting(self._start_s)
            if isinstance(greeting, Unfit):
                raise StartError(greeting.text, greeting)
            self._check(greeting)
        except WorkerLostError as error:
            raise StartError(str(error)) from error
        except BaseException:
            connection.close()
            raise
        self._device = ", ".join(greeting.devices)
        self._is_ready = True
        self._refusal = None
        self._on_ability(True)
        self._tell()
        return greeting

    def _died(self, connection: Connection, death: Death) -> None:
        if connection is not self._connection or self._is_closed:
            return
        was_ready, self._is_ready = self._is_ready, False
        self._last_failure = death.cause
        if not was_ready:
            return  # Whoever starts it is told.
        self._judge(death)
        self._restarts[_kind(death)] += 1
        delay_s = 0.0 if death.in_hand else _FIRST_DELAY_S
        self._starting = asyncio.create_task(self._restart(delay_s))

    def _judge(self, death: Death) -> None:
        self._on_trial = None
        culprit = death.overdue.undertaking if death.overdue else None
        if culprit is None and len(death.in_hand) == 1:
            culprit = death.in_hand[0]
        if culprit is None:
            self._suspects = list(dict.fromkeys(death.in_hand))
            names = ", ".join(each.function for each in self._suspects)
            at_work = f"running one of {names}" if names else "idle"
            _log.warning("the worker process %s while %s", death.cause, at_work)
            return
        # It explains the death, so that the others need not be tried any more.
        self._suspects = []
        culprit.verdict = _verdict(culprit, death)
        deed = _deed(death)
        if culprit.counts:
            self._quarantine.strike(culprit.function, deed)
        self._last_failure = f"{culprit.function}: {deed}"
        _log.warning("%s; a new worker process is started", self._last_failure)

    async def _restart(self, delay_s: float) -> None:
        start = time.monotonic()
        while True:
            await asyncio.sleep(delay_s)
            try:
                await self._begin()
            except Exception as error:
                _log.error("the worker process can't be started: %s", error)
                self._last_failure = f"it can't be started: {error}"
                self._refusal = _no_worker
                self._suspects = []
                self._on_ability(False)
                self._tell()
                delay_s = min(max(2 * delay_s, _FIRST_DELAY_S), _LONGEST_DELAY_S)
            else:
                seconds = time.monotonic() - start
                _log.info("a new worker process is ready after %.1f s", seconds)
                return


def _no_worker() -> ServiceError:
    return ServiceError(
        "WORKER_UNAVAILABLE",
        "the process that runs this function can't be started. Look into the server's "
        "log; try again later, or another server.",
        retry_after_s=_LONGEST_DELAY_S,
    )


def _kind(death: Death) -> str:
    return "time budget" if death.overdue is not None else "died"


def _deed(death: Death) -> str:
    if death.overdue is None:
        return f"its process {death.cause}"
    budget = death.overdue.budget
    return f"it {budget.deed} for more than {budget.seconds:g} s"


def _verdict(culprit: Undertaking, death: Death) -> ServiceError:
    resource = f"functions/{culprit.function}"
    if death.overdue is not None:
        budget, took_s = death.overdue.budget, death.overdue.took_s
        return ServiceError(
            "TIME_BUDGET_SPENT",
            f"{resource} {budget.deed} for {took_s:.1f} s, but may take "
            f"{budget.seconds:g} s; it was ended. Ask for less at once, or raise "
            f"{budget.setting}.",
            function=resource,
            took_s=f"{took_s:.3f}",
            setting=budget.setting,
            budget_s=f"{budget.seconds:g}",
        )
    return ServiceError(
        "WORKER_DIED",
        f"{resource} has ended the process that ran it, which {death.cause}. Pass "
        "inputs that it can take, or mend the function.",
        function=resource,
        cause=death.cause,
    )


def _not_done(undertaking: Undertaking) -> ServiceError:
    resource = f"functions/{undertaking.function}"
    return ServiceError(
        "WORKER_DIED",
        f"{resource} was not computed: the process that runs it ended "
        f"{undertaking.deaths} times meanwhile, for other reasons. Try again later.",
        function=resource,
        retry_after_s=_LONGEST_DELAY_S,
    )
