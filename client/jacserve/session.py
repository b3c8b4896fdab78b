"""Many calls over one stream, which costs each less than a call of its own.

A thread reads the answers and hands each to whoever waits for it: they may overtake
each other. When the stream breaks, all who wait are told; the next call opens another.
"""

import queue
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack, cast
from weakref import ref

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import status_pb2  # pyright: ignore[reportMissingTypeStubs]

from jacserve import framing
from jacserve.alarms import Alarms
from jacserve.errors import (
    DeadlineError,
    JacobianError,
    UnavailableError,
    from_rpc_error,
    from_status,
    unreadable,
)
from jacserve.evaluation import Answer, Memory, Step, drive, evaluation
from jacserve.evaluator import Evaluator
from jacserve.framing import PIECE_BYTES
from jacserve.queries import (
    Ask,
    EvaluateOptions,
    Inputs,
    QueryEncoder,
    timeout_of,
)
from jacserve.results import Result
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import Quantity

# Opens a stream: takes requests, and is iterated over for responses.
Opener: TypeAlias = Callable[[Iterator[bytes]], Any]
# Takes an answer, or the error that came instead.
_Taker: TypeAlias = Callable[[bytes | JacobianError], None]
_Steps: TypeAlias = Generator[Step, Answer, Result]

_ID_TAG = pb.SessionRequest.ID_FIELD_NUMBER << 3 | framing.FIXED64
_encode_id = struct.Struct("<BQ")  # The tag of a fixed64 field, and its value.
_TIMEOUT = pb.SessionRequest.TIMEOUT_FIELD_NUMBER
_CANCEL = pb.SessionRequest.CANCEL_FIELD_NUMBER
_QUERY = pb.SessionRequest.QUERY_FIELD_NUMBER
_RESPONSE_ID = pb.SessionResponse.ID_FIELD_NUMBER
_RESULT = pb.SessionResponse.RESULT_FIELD_NUMBER
_ERROR = pb.SessionResponse.ERROR_FIELD_NUMBER


class _Stream:
    """One stream, until it breaks or is closed."""

    def __init__(self, open_stream: Opener, target: str) -> None:
        self._target = target
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[int, _Taker] = {}
        self.is_open = True
        self._call = open_stream(iter(self._requests.get, None))
        self._reader = threading.Thread(
            target=self._read, name="jacserve-session", daemon=True
        )
        self._reader.start()
        self.reader_id = self._reader.ident

    def post(self, id_: int, message: bytes, take: _Taker) -> bool:
        """Sends a query; returns whether the stream was open for it."""
        with self._lock:
            if not self.is_open:
                return False
            self._waiting[id_] = take
        self._requests.put(_encode_id.pack(_ID_TAG, id_) + message)
        return True

    def end(self) -> None:
        """Lets those that wait have their answers; takes nothing new."""
        with self._lock:
            self.is_open = False
        self._requests.put(None)

    def drop(self, id_: int) -> None:
        """Has the server drop a query that nobody waits for any more."""
        if self._waiting.pop(id_, None) is not None:
            cancel = framing.number_field(_CANCEL, True)
            self._requests.put(_encode_id.pack(_ID_TAG, id_) + cancel)

    def close(self, *, is_abrupt: bool) -> None:
        """Lets those that wait have their answers, or cancels them; then ends."""
        self._requests.put(None)
        if is_abrupt:
            self._call.cancel()
        if threading.get_ident() != self.reader_id:
            self._reader.join()

    @staticmethod
    def _is_unable(answer: JacobianError) -> bool:
        """Whether the server can't serve: another stream may lead to another server."""
        return isinstance(answer, UnavailableError)

    def _read(self) -> None:
        error: JacobianError
        try:
            for raw in self._call:
                id_, answer = read_response(raw, self._target)
                if isinstance(answer, JacobianError) and self._is_unable(answer):
                    self.end()
                if (take := self._waiting.pop(id_, None)) is not None:
                    take(answer)
            error = UnavailableError("The session has ended.", code="UNAVAILABLE")
        except grpc.RpcError as raised:
            error = from_rpc_error(cast("grpc.Call", raised), self._target)
        except Exception as raised:  # Whatever it is, those that wait must know.
            self._call.cancel()
            error = unreadable(raised)
        with self._lock:
            self.is_open = False
            waiting, self._waiting = self._waiting, {}
        # gRPC's thread that sends what is in the queue ends only by this.
        self._requests.put(None)
        for take in waiting.values():
            take(error)


def read_response(raw: bytes, target: str) -> tuple[int, bytes | JacobianError]:
    """Reads a message of a session's stream.

    Args:
        raw: A serialized SessionResponse, from anywhere.
        target: The server's address, for messages.

    Returns:
        The id of the query, and its serialized Result or its error.

    Raises:
        DecodeError: It is no answer.
    """
    id_: int | None = None
    answer: bytes | JacobianError | None = None
    for field in framing.fields(raw, 0, len(raw)):
        if (field.number, field.wire_type) == (_RESPONSE_ID, framing.FIXED64):
            is_repeated = id_ is not None
            id_ = int.from_bytes(raw[field.start : field.stop], "little")
        elif field.number in (_RESULT, _ERROR) and field.is_bytes:
            is_repeated = answer is not None
            answer = raw[field.start : field.stop]
            if field.number == _ERROR:
                answer = from_status(status_pb2.Status.FromString(answer), target)
        else:
            continue
        if is_repeated:
            raise DecodeError("a field comes twice")
    if answer is None:
        raise DecodeError("an answer has neither a result nor an error")
    return id_ or 0, answer


class _Submitted(Future[Result]):
    """The result of a query that was submitted; to cancel it drops the query."""

    def __init__(self) -> None:
        super().__init__()
        self.drop: Callable[[], object] = lambda: None
        self._settling = threading.Lock()
        self._is_settled = False

    def settle(self) -> bool:
        """Ends the time in which it can be cancelled; returns whether it was not."""
        with self._settling:
            if self._is_settled:
                return False
            self._is_settled = True
            return self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        if is_cancelled:
            self.settle()  # Tells those who wait for it.
            self.drop()
        return is_cancelled


class Session(Evaluator):
    """Evaluates over one stream; see `Client.session`.

    Any number of threads may share it. Its methods are `Client`'s, and raise the same
    errors; UnavailableError also when the stream breaks before the answer.
    """

    def __init__(
        self,
        open_stream: Opener,
        send: Callable[[Step], Answer],
        *,
        encoder: QueryEncoder,
        memory: Memory,
        target: str,
        timeout_s: float | None,
        retries: int,
        window: int,
    ) -> None:
        """Opens no stream yet.

        Args:
            open_stream: Opens one.
            send: Sends a step in a call of its own, for what is too large here.
            encoder: Makes queries.
            memory: What the client remembers.
            target: The server's address, for messages.
            timeout_s: The timeout of calls that name none, in seconds.
            retries: How often an evaluation may be sent again.
            window: How many submitted queries may be without an answer.
        """
        if window < 1:
            raise ValueError(f"window is {window}; pass 1 or more")
        self._open_stream = open_stream
        self._send_alone = send
        self._encoder = encoder
        self._memory = memory
        self._target = target
        self._timeout_s = timeout_s
        self._retries = retries
        self._ids = count(1)
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._is_closed = False  # For new evaluations.
        self._has_ended = False  # For those that go on, too.
        self._alarms = Alarms()
        self._room = threading.Semaphore(window)
        self._pool = ThreadPoolExecutor(2, "jacserve-session")
        self._submitted: set[_Submitted] = set()

    def __enter__(self) -> Self:
        """Returns the session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for what was submitted, and closes the stream.

        After an exception it does not wait, and what was submitted is cancelled.
        """
        self._close(is_abrupt=error is not None)

    def close(self) -> None:
        """Waits for what was submitted, and closes the stream."""
        self._close(is_abrupt=False)

    def _close(self, *, is_abrupt: bool) -> None:
        self._is_closed = True
        if not is_abrupt and not self._is_reading:
            # Some may have to be asked again, by the same stream or another.
            wait(self._submitted.copy())
        with self._lock:
            self._has_ended = True
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close(is_abrupt=is_abrupt)
        if is_abrupt:
            for future in tuple(self._submitted):
                future.cancel()
        self._alarms.close()
        self._pool.shutdown(wait=not is_abrupt, cancel_futures=is_abrupt)

    def evaluate(
        self,
        function: str,
        inputs: Inputs,
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        **options: Unpack[EvaluateOptions],
    ) -> Result:
        """Evaluates any set of quantities; see `Client.evaluate`."""
        self._check_open()
        ask = self._encoder.encode(function, inputs, quantities, options)
        timeout_s = timeout_of(options.get("timeout_s"), self._timeout_s)
        return drive(self._evaluation(ask, timeout_s), self._send)

    def submit(
        self,
        function: str,
        inputs: Inputs,
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        **options: Unpack[EvaluateOptions],
    ) -> Future[Result]:
        """Sends a query, and does not wait for its answer.

        Waits only while as many queries as the session's window are without one.

        Args:
            function: A registered name.
            inputs: As for `Client.evaluate`; copied before this returns, unless they
                are more than 1 MiB.
            quantities: As for `Client.evaluate`.
            **options: As for `Client.evaluate`.

        Returns:
            A future of the result, or of the error. They may be done in another order
            than they were submitted in. To cancel it drops the query where it has not
            begun. Its callbacks run in the thread that reads answers, and hold it up.

        Raises:
            InvalidRequestError: A word or an array can't be sent.
        """
        self._check_open()
        ask = self._encoder.encode(function, inputs, quantities, options)
        if not ask.form.size_bytes > PIECE_BYTES:
            ask = Ask(ask.form, [array.copy() for array in ask.arrays])
        timeout_s = timeout_of(options.get("timeout_s"), self._timeout_s)
        future = _Submitted()
        # The thread that reads answers is the one that makes room.
        if not self._room.acquire(blocking=not self._is_reading):
            raise RuntimeError(
                "a callback submits more than the session's window has room for. "
                "Submit from another thread."
            )
        self._submitted.add(future)
        future.add_done_callback(self._let_go)
        if timeout_s is not None:
            # The server looks at it, too, if it is still there.
            self._alarms.set(timeout_s, partial(self._expire, ref(future)))
        steps = self._evaluation(ask, timeout_s)
        try:
            self._advance(future, steps, next(steps))
        except BaseException:
            future.cancel()
            raise
        return future

    def _evaluation(self, ask: Ask, timeout_s: float | None) -> _Steps:
        return evaluation(ask, self._memory, timeout_s=timeout_s, retries=self._retries)

    def _advance(self, future: _Submitted, steps: _Steps, step: Step) -> None:
        """Sends a step of a submitted evaluation, and goes on when its answer comes."""

        def proceed(answer: Answer | JacobianError) -> None:
            if future.done():
                return
            try:
                if isinstance(answer, JacobianError):
                    following = steps.throw(answer)
                else:
                    following = steps.send(answer)
                self._advance(future, steps, following)
            except StopIteration as stop:
                if future.settle():
                    future.set_result(stop.value)
            except Exception as error:
                if future.settle():
                    future.set_exception(error)

        def send_alone() -> None:
            try:
                answer = self._send_alone(step._replace(delay_s=0.0))
            except JacobianError as error:
                proceed(error)
            else:
                proceed(answer)

        def go() -> None:
            if step.is_streamed:
                future.drop = self._pool.submit(send_alone).cancel
            else:
                id_, stream = self._post(step, proceed)
                future.drop = partial(stream.drop, id_)

        def go_late() -> None:
            if future.done():
                return
            try:
                go()
            except Exception as error:  # The session has been closed.
                if future.settle():
                    future.set_exception(error)

        if step.delay_s:
            future.drop = lambda: None
            self._alarms.set(step.delay_s, go_late)
        else:
            go()

    def _send(self, step: Step) -> Answer:
        timeout_s = step.timeout_s
        if step.is_streamed:
            return self._send_alone(step)
        if self._is_reading:
            raise RuntimeError(
                "a callback of a session waits for an answer of the same session, and "
                "holds up the thread that reads answers. Use submit."
            )
        if step.delay_s:
            time.sleep(step.delay_s)
        inbox: queue.SimpleQueue[bytes | JacobianError] = queue.SimpleQueue()
        id_, stream = self._post(step, inbox.put)
        try:
            answer = inbox.get(timeout=None if timeout_s is None else max(timeout_s, 0))
        except queue.Empty:
            stream.drop(id_)
            raise self._too_late() from None
        except BaseException:
            stream.drop(id_)
            raise
        if isinstance(answer, JacobianError):
            raise answer
        return answer

    def _post(self, step: Step, take: _Taker) -> tuple[int, _Stream]:
        raw, timeout_s = step.ask.to_bytes(), step.timeout_s
        message = framing.bytes_field(_QUERY, len(raw)) + raw
        if timeout_s is not None:
            timeout = Duration(seconds=int(timeout_s), nanos=int(timeout_s % 1 * 1e9))
            encoded = timeout.SerializeToString()
            message = framing.bytes_field(_TIMEOUT, len(encoded)) + encoded + message
        id_ = next(self._ids)
        while True:
            stream = self._stream
            if stream is None or not stream.is_open:
                stream = self._reopened()
            if stream.post(id_, message, take):
                return id_, stream

    @property
    def _is_reading(self) -> bool:
        """Whether this is the thread that reads answers, in a callback."""
        stream = self._stream
        return stream is not None and stream.reader_id == threading.get_ident()

    def _expire(self, reference: "ref[_Submitted]") -> None:
        future = reference()
        if future is not None and future.settle():
            future.set_exception(self._too_late())
            future.drop()

    def _too_late(self) -> DeadlineError:
        return DeadlineError(
            f"{self._target} did not answer in time. Pass a larger timeout_s: the "
            "first call of a function for new shapes also compiles it.",
            code="DEADLINE_EXCEEDED",
        )

    def _let_go(self, future: "Future[Result]") -> None:
        self._submitted.discard(cast("_Submitted", future))
        self._room.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the session is closed")

    def _reopened(self) -> _Stream:
        with self._lock:
            if self._has_ended:
                raise RuntimeError("the session is closed")
            if self._stream is None or not self._stream.is_open:
                self._stream = _Stream(self._open_stream, self._target)
            return self._stream
