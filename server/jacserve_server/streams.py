"""The streams that are open: how many each client has, and which of them stand still.

gRPC has no bound on how long a client takes to send what it has begun, or to take
what it is sent. Here neither may stand still for longer than a given time: an upload
is ended then, and what makes an answer is closed, so that its memory and its place
among what is in flight are free again. gRPC can't end a call whose client takes
nothing: it counts as a stream of that client until the client takes what it was sent,
or is gone.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from jacserve_server.callers import Call
from jacserve_server.errors import ServiceError

M = TypeVar("M")

# An upload goes on while so many bytes come in the time that it may stand still; the
# other direction goes on by pieces, of a MiB.
_STEP_BYTES = 2**16


def idle(problem: str, idle_s: float, remedy: str) -> ServiceError:
    """Makes the error of a client that has kept a stream waiting for too long."""
    return ServiceError(
        "STREAM_IDLE", f"{problem} for {idle_s:g} s. {remedy}", idle_s=idle_s
    )


class Streams:
    """Counts streams, and ends those that stand still. Used from one event loop.

    Attributes:
        count: How many are open.
    """

    def __init__(self, *, max_per_client: int, idle_s: float) -> None:
        """Starts with none.

        Args:
            max_per_client: The most that one client may have open.
            idle_s: Seconds for which one may stand still while its client has to send
                or to take something.
        """
        self.count = 0
        self._most = max_per_client
        self._idle_s = idle_s
        # Those that have one, so that it does not grow for ever.
        self._counts: Counter[str] = Counter()

    @contextmanager
    def place(self, client: str) -> Generator[None]:
        """Counts a stream as its client's.

        Args:
            client: Whose it is.

        Raises:
            ServiceError: It has as many as it may.
        """
        if self._counts[client] >= self._most:
            raise ServiceError(
                "TOO_MANY_STREAMS",
                f"{self._counts[client]} streams of this client are open, and this "
                f"server takes at most {self._most} of each. Close sessions that are "
                "not used, or wait for answers before asking for more.",
                streams=self._counts[client],
                max_streams=self._most,
            )
        self.count += 1
        self._counts[client] += 1
        try:
            yield
        finally:
            self.count -= 1
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    async def arriving(self, raws: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """Yields the messages of an upload as they come.

        Args:
            raws: The messages.

        Raises:
            ServiceError: For too long there were none, or next to none.
        """
        iterator, loop = aiter(raws), asyncio.get_running_loop()
        left_s, came = self._idle_s, 0
        while True:
            start = loop.time()
            try:
                async with asyncio.timeout(left_s):
                    raw = await anext(iterator, None)
            except TimeoutError:
                raise idle(
                    f"only {came} bytes of the upload have come",
                    self._idle_s,
                    f"Send it again, at least {_STEP_BYTES} bytes in that time.",
                ) from None
            if raw is None:
                return
            came += len(raw)
            if came >= _STEP_BYTES:
                left_s, came = self._idle_s, 0
            else:
                left_s -= loop.time() - start
            yield raw

    def pacing(
        self, answering: Callable[[Call], AsyncGenerator[M]]
    ) -> Callable[[Call], AsyncGenerator[M]]:
        """Makes answers come at the pace of their client, and count as its stream.

        Args:
            answering: Makes answers. It is closed when the client takes none for too
                long.

        Returns:
            Makes the same answers. When their client takes the next one after all, they
            end with a ServiceError.
        """

        async def paced(call: Call) -> AsyncGenerator[M]:
            with self.place(call.client):
                answers = answering(call)
                pace = _Pace(answers, self._idle_s)
                try:
                    async for answer in answers:
                        pace.hold()
                        yield answer
                        pace.go_on()
                finally:
                    await pace.close()

        return paced


class _Pace:
    """Closes what makes answers when nobody takes them."""

    __slots__ = ("_alarm", "_answers", "_closing", "_held_at", "_idle_s", "_loop")

    def __init__(self, answers: AsyncGenerator[Any], idle_s: float) -> None:
        self._answers = answers
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._held_at: float | None = None
        self._closing: asyncio.Task[None] | None = None
        # One alarm that is set anew when it goes off: to set it for each answer would
        # take longer than to send a small one.
        self._alarm = self._loop.call_later(idle_s, self._look)

    def hold(self) -> None:
        """Hears that an answer is handed to gRPC."""
        self._held_at = self._loop.time()

    def go_on(self) -> None:
        """Hears that the client has taken it."""
        self._held_at = None
        if self._closing is not None:
            raise idle(
                "the client has taken nothing of the answer",
                self._idle_s,
                "Ask again, and read answers as they come.",
            )

    def _look(self) -> None:
        now = self._loop.time()
        left_s = (now if self._held_at is None else self._held_at) + self._idle_s - now
        if left_s > 0:
            self._alarm = self._loop.call_later(left_s, self._look)
        else:
            self._closing = self._loop.create_task(self._close_answers())

    async def _close_answers(self) -> None:
        await self._answers.aclose()

    async def close(self) -> None:
        """Closes what makes answers, and looks no more."""
        self._alarm.cancel()
        await (self._closing or self._answers.aclose())
