"""What watching and reading a job comes to, whoever waits: shared by both clients."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from jacserve.errors import DeadlineError, JacobianError, UnavailableError, readable
from jacserve.evaluation import Received
from jacserve.job_messages import JobInfo, decode_job
from jacserve.patience import Patience, passes
from jacserve.results import Result, decode_opened
from jacserve.sparse import SparseLayout
from jacserve.v1 import jobs_pb2
from jacserve.vocabulary import Quantity

Quantities = Quantity | Sequence[Quantity] | None

# For how long a server may be away, as when it is started anew, or its storage.
PATIENCE_S = 60.0

# A stream is opened anew after this, lest a connection that has died without a word is
# listened to for ever.
_STREAM_S = 300.0


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Results of a range of a job's points.

    Attributes:
        start: The first point.
        stop: The one after the last.
        result: Their result, as of one batch.
    """

    start: int
    stop: int
    result: Result

    def __repr__(self) -> str:
        """Shows the range."""
        return f"<Chunk {self.start}:{self.stop} {self.result!r}>"


def next_stop(start: int, info: JobInfo) -> int | None:
    """Returns where the chunk that starts at a point stops; None while it is not ready.

    Args:
        start: The point.
        info: How far the job is.

    Returns:
        At most the end of the chunk of the store that the point is in.
    """
    ready_count, chunk_size = info.progress.ready_count, info.chunk_size
    if start >= ready_count:
        return None
    if not chunk_size:
        return ready_count
    return min(ready_count, (start // chunk_size + 1) * chunk_size)


def decode_rows(
    received: Received, layout: SparseLayout | None, *, keep_dense: bool = False
) -> Result:
    """Decodes results of a range.

    Args:
        received: They, as they came.
        layout: The sparse layout of the job, if any.
        keep_dense: Leaves matrices dense where the server has no pattern of them. They
            would get one from their numbers, which is another for each range.

    Returns:
        The results.

    Raises:
        ServerError: They can't be read.
    """
    if keep_dense and not received.head.patterns:
        layout = None
    with readable():
        return decode_opened(*received, layout)


class News:
    """Follows a job over one stream after another."""

    def __init__(
        self, last: JobInfo, target: str, *, patience_s: float, timeout_s: float | None
    ) -> None:
        """Has heard nothing yet.

        Args:
            last: What is known of the job.
            target: The server's address.
            patience_s: For how long the server or its storage may be away at a time.
            timeout_s: For how long to follow; None for as long as it takes.
        """
        self.last = last
        self._target = target
        self._patience = Patience(patience_s)
        self._timeout_s = timeout_s
        self._stop = None if timeout_s is None else time.monotonic() + timeout_s
        self._message: jobs_pb2.Job | None = None
        self._is_heard = False

    def remaining_s(self) -> float | None:
        """Returns the seconds that are left; None where there is no limit."""
        return None if self._stop is None else max(0.0, self._stop - time.monotonic())

    def opens(self) -> float:
        """Begins with the next stream.

        Returns:
            The timeout of the stream, in seconds.
        """
        self._is_heard = False
        remaining_s = self.remaining_s()
        return _STREAM_S if remaining_s is None else min(_STREAM_S, remaining_s)

    def hears(self, message: jobs_pb2.Job) -> JobInfo | None:
        """Takes the next message.

        Args:
            message: The job as it is now.

        Returns:
            What it says; None where that was known.
        """
        self._is_heard = True
        self._patience.renew()
        if message == self._message:
            return None
        self._message = message
        self.last = decode_job(message, self._target)
        return self.last

    def pause_s(self, error: JacobianError | None) -> float:
        """Tells what to do when a stream has ended before the job has.

        Args:
            error: What it ended with, if anything.

        Returns:
            Seconds to wait before the next stream.

        Raises:
            JacobianError: There is no use in another one.
        """
        remaining_s = self.remaining_s()
        if isinstance(error, DeadlineError):
            if remaining_s == 0:
                raise self._too_late() from error
            if self._is_heard:
                return 0.0
        elif error is not None and not passes(error):
            raise error
        pause_s = self._patience.wait_s(error or self._cut_short())
        return pause_s if remaining_s is None else min(pause_s, remaining_s)

    def _too_late(self) -> DeadlineError:
        job, progress = self.last, self.last.progress
        return DeadlineError(
            f"job {job.id} has not ended within {self._timeout_s:g} s: "
            f"{progress.done_count:,} of {progress.point_count:,} points are computed. "
            "It goes on; wait again, or longer.",
            code="DEADLINE_EXCEEDED",
        )

    def _cut_short(self) -> UnavailableError:
        return UnavailableError(
            f"{self._target} says no more of job {self.last.id}, which has not ended. "
            "Ask again when the server is back.",
            code="UNAVAILABLE",
        )
