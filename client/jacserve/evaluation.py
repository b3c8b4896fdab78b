"""How one evaluation goes, whoever does the input and output.

`evaluation` yields what to send and is sent what came back. The blocking client, the
asyncio client and sessions all drive it, so that nothing is decided twice.
"""

import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from jacserve.errors import (
    JacobianError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
    readable,
    unreadable,
)
from jacserve.patience import retry_after_s
from jacserve.queries import Ask
from jacserve.results import Result, ResultDecoder, decode_opened
from jacserve.sparse import Pattern, PatternCache
from jacserve.streaming import Assembly, StreamError, read_head
from jacserve.tensors import spec_of
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2


class Step(NamedTuple):
    """What to send next.

    Attributes:
        ask: The query.
        is_streamed: Whether by EvaluateStream; else in one message.
        timeout_s: Seconds to wait for the answer; None for no limit.
        delay_s: Seconds to wait before it is sent.
    """

    ask: Ask
    is_streamed: bool
    timeout_s: float | None = None
    delay_s: float = 0.0


class Received(NamedTuple):
    """A result that came in parts.

    Attributes:
        head: The hollow message.
        payloads: The bytes of its tensors.
    """

    head: pb.Result
    payloads: list[Any]


Answer: TypeAlias = bytes | Received


class Memory:
    """What a client remembers of earlier evaluations. Thread-safe."""

    def __init__(self) -> None:
        """Remembers nothing yet."""
        self.patterns = PatternCache()
        self.decoder = ResultDecoder()


def evaluation(
    ask: Ask, memory: Memory, *, timeout_s: float | None, retries: int
) -> Generator[Step, Answer, Result]:
    """Evaluates a query.

    It is sent again where another attempt may fare better: an evaluation changes
    nothing, however often it comes.

    Args:
        ask: The query.
        memory: What is remembered.
        timeout_s: Seconds for all of it; None for no limit.
        retries: How often it may be sent again.

    Yields:
        What to send. To be sent the answer: a serialized Result, or one that came in
        parts; or to be thrown the JacobianError that came instead.

    Returns:
        The result.

    Raises:
        JacobianError: What was thrown, where no other way of asking mends it; or the
            answer can't be read.
    """
    known: Mapping[str, Pattern] = {}
    layout = ask.form.sparse_layout
    if layout and (known := memory.patterns.find(ask.form.query)):
        ask = Ask(ask.form.naming(known), ask.arrays)
    stop = None if timeout_s is None else time.monotonic() + timeout_s
    left_s, delay_s, attempt, cuts = timeout_s, 0.0, 0, 0
    while True:
        is_streamed = ask.form.is_streamed
        try:
            answer = yield Step(ask, is_streamed, left_s, delay_s)
        except (OverloadedError, UnavailableError) as error:
            if stop is not None:
                left_s = stop - time.monotonic()
            cuts += isinstance(error, UnavailableError) and error.is_cut_off
            may_retry = attempt < retries and cuts <= _MOST_CUTS
            pause_s = _pause_s(error, is_streamed, attempt) if may_retry else None
            if pause_s is None or (left_s is not None and pause_s >= left_s):
                raise
            attempt, delay_s = attempt + 1, pause_s
            if left_s is not None:
                left_s -= pause_s
            continue
        except PreconditionError as error:
            if error.reason == "STREAM_REQUIRED" and not is_streamed:
                ask.form.is_streamed = True
            elif error.reason == "PATTERN_UNKNOWN" and known:
                # The server has another function than before under this name.
                memory.patterns.forget(ask.form.query)
                ask, known = Ask(ask.form.naming(()), ask.arrays), {}
            else:
                raise
            delay_s = 0.0
            if stop is not None:
                left_s = max(0.0, stop - time.monotonic())
            continue
        with readable():
            if isinstance(answer, bytes):
                result = memory.decoder.decode(answer, layout, known)
            else:
                result = decode_opened(*answer, layout, known)
            if ask.form.quantities.symmetric_difference(result.quantities):
                raise ValueError("it has other quantities than were asked for")
        if layout:
            memory.patterns.learn(ask.form.query, result.shared_patterns)
        return result


# Who has to wait for longer may have something better to do.
_LONGEST_WAIT_S = 10.0
# A query that was cut off more often may be what ends servers, and is kept from others.
_MOST_CUTS = 2


def _pause_s(error: JacobianError, is_streamed: bool, attempt: int) -> float | None:
    """Returns the seconds after which to try again; None for no use in that."""
    told_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
    # A session was idle when the query came; but of a call of its own it is the query
    # that was too slow, and will be again.
    is_too_slow = error.reason == "STREAM_IDLE" and is_streamed
    if is_too_slow or told_s > _LONGEST_WAIT_S:
        return None
    return retry_after_s(attempt, told_s)


def drive(
    steps: Generator[Step, Answer, Result], send: Callable[[Step], Answer]
) -> Result:
    """Drives an evaluation by blocking calls.

    Args:
        steps: The evaluation.
        send: Sends what a step says; returns the answer or raises JacobianError.

    Returns:
        The result.
    """
    try:
        step = next(steps)
        while True:
            try:
                answer = send(step)
            except JacobianError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value


async def drive_async(
    steps: Generator[Step, Answer, Result], send: Callable[[Step], Awaitable[Answer]]
) -> Result:
    """Drives an evaluation by calls that are awaited; else as `drive`."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await send(step)
            except JacobianError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value


class Receiver:
    """Takes a result in parts."""

    def __init__(
        self,
        kind: type[
            pb.EvaluateStreamResponse | jobs_pb2.ReadJobResultResponse
        ] = pb.EvaluateStreamResponse,
    ) -> None:
        """Has none yet.

        Args:
            kind: Of what type the parts are.
        """
        # Either has the same head.
        self._kind = cast("type[pb.EvaluateStreamResponse]", kind)
        self._head: pb.Result | None = None
        self._assembly: Assembly | None = None

    def feed(self, raw: bytes) -> None:
        """Takes the next part.

        Args:
            raw: The part, serialized.

        Raises:
            ServerError: It is not the part that comes next.
        """
        with readable():
            if self._assembly is not None:
                self._assembly.feed(raw)
            else:
                part, holes = read_head(raw, self._kind)
                head = part.head
                found = [output.tensor for output in head.outputs]
                if head.HasField("finite_points"):
                    found.append(head.finite_points)
                for tensor in found:
                    spec_of(tensor, tensor.streamed_bytes)  # Before it is allocated.
                self._head = head
                self._assembly = Assembly(raw, holes)

    def received(self) -> Received:
        """Returns the result.

        Raises:
            ServerError: Parts are missing.
        """
        if self._head is None or self._assembly is None:
            raise unreadable(StreamError("it has no head"))
        if not self._assembly.is_complete:
            raise unreadable(StreamError("it ends before its last piece"))
        return Received(self._head, self._assembly.payloads)
