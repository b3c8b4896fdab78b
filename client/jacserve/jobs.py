"""Batch jobs, as the blocking client has them.

A job lives on the server: whoever watches or reads it goes on where he was after either
side has been away.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

from jacserve import job_files
from jacserve.channels import CREATE_JOB, READ_JOB_RESULT
from jacserve.errors import JacobianError, UnavailableError, translated
from jacserve.evaluation import Received, Receiver
from jacserve.job_files import ResultFile
from jacserve.job_messages import (
    JobInfo,
    JobProgress,
    JobRequest,
    decode_job,
    encode_list_request,
    encode_read_request,
)
from jacserve.job_reading import (
    PATIENCE_S,
    Chunk,
    News,
    Quantities,
    decode_rows,
    next_stop,
)
from jacserve.patience import RESEND_AFTER_S, Patience, passes
from jacserve.queries import sparse_layout_of, timeout_of
from jacserve.results import Result
from jacserve.sparse import SparseLayout
from jacserve.v1 import jobs_pb2, jobs_pb2_grpc

T = TypeVar("T")


class JobCalls:
    """The calls of JobService over a client's channel."""

    def __init__(
        self, channel: grpc.Channel, target: str, timeout_s: float | None
    ) -> None:
        """Prepares them.

        Args:
            channel: The channel.
            target: The server's address, for messages.
            timeout_s: The timeout of calls that name none, in seconds.
        """
        self.target = target
        self._timeout_s = timeout_s
        self.stub = jobs_pb2_grpc.JobServiceStub(channel)
        # Messages with tensors are read and written by jacserve itself.
        self._create: Any = channel.stream_unary(
            CREATE_JOB, None, jobs_pb2.Job.FromString
        )
        self._read: Any = channel.unary_stream(
            READ_JOB_RESULT, jobs_pb2.ReadJobResultRequest.SerializeToString
        )

    def submit(self, request: JobRequest, timeout_s: float | None) -> "Job":
        """Creates a job; sends it again while the server is away.

        Args:
            request: The job.
            timeout_s: Seconds for each attempt; None for the client's own.

        Returns:
            The job.
        """
        timeout_s = timeout_of(timeout_s, self._timeout_s)
        for pause_s in RESEND_AFTER_S:
            try:
                return self._submit_once(request, timeout_s)
            except UnavailableError:
                time.sleep(pause_s)
        return self._submit_once(request, timeout_s)

    def _submit_once(self, request: JobRequest, timeout_s: float | None) -> "Job":
        with translated(self.target):
            message = self._create(request.to_parts(), timeout=timeout_s)
        return Job(self, message)

    def find(self, id: str, owner: str, timeout_s: float | None) -> "Job":
        """Looks a job up by its id; see `Client.job`."""
        request = jobs_pb2.GetJobRequest(name=id, owner=owner)
        return Job(self, self.ask(self.stub.GetJob, request, timeout_s), owner)

    def list(
        self, states: str | Sequence[str], owner: str, timeout_s: float | None
    ) -> list[JobInfo]:
        """Lists jobs, page by page; see `Client.jobs`."""
        request = encode_list_request(states, owner)
        found: list[JobInfo] = []
        while True:
            page = self.ask(self.stub.ListJobs, request, timeout_s)
            found += [decode_job(message, self.target) for message in page.jobs]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def ask(self, call: Callable[..., T], request: Any, timeout_s: float | None) -> T:
        """Makes a call that one message answers."""
        with translated(self.target):
            return call(request, timeout=timeout_of(timeout_s, self._timeout_s))

    def watch(self, id: str, owner: str, timeout_s: float) -> Generator[jobs_pb2.Job]:
        """Yields a job as it is now, and whenever it has got further."""
        with translated(self.target):
            request = jobs_pb2.WatchJobRequest(name=id, owner=owner)
            call: Any = self.stub.WatchJob(request, timeout=timeout_s)
            try:
                for news in call:
                    yield news.job
            finally:
                call.cancel()  # It has ended, unless nobody listens any more.

    def read(
        self, request: jobs_pb2.ReadJobResultRequest, timeout_s: float | None
    ) -> Received:
        """Reads results of a range of points."""
        receiver = Receiver(jobs_pb2.ReadJobResultResponse)
        with translated(self.target):
            call = self._read(request, timeout=timeout_of(timeout_s, self._timeout_s))
            try:
                for raw in call:
                    receiver.feed(raw)
            finally:
                call.cancel()  # It has ended, unless something was raised.
        return receiver.received()


class Job:
    """A batch job on a server, as `Client.submit_job` and `Client.job` return it.

    ```python
    job = client.submit_job("spherical", np.load("points.npy", mmap_mode="r"))
    for chunk in job:
        print(chunk.start, chunk.result.jacobian.shape)
    ```

    To iterate is to take `chunks()`. Methods raise JacobianError or one of its kinds,
    as `Client` does: NotFoundError where the job has been deleted.
    """

    def __init__(self, calls: JobCalls, message: jobs_pb2.Job, owner: str = "") -> None:
        """Takes a job that a server has returned.

        Args:
            calls: The calls of its server.
            message: The job.
            owner: Whose it is; "" for the caller's own.
        """
        self._calls = calls
        self._owner = owner
        self._last = decode_job(message, calls.target)
        self._layout: SparseLayout | None = sparse_layout_of(message.query)

    @property
    def id(self) -> str:
        """The id that `Client.job` finds it by."""
        return self._last.id

    def info(self, *, timeout_s: float | None = None) -> JobInfo:
        """Asks how the job is.

        Args:
            timeout_s: Seconds for the call.

        Returns:
            What it computes, its state, and how far it is.
        """
        request = jobs_pb2.GetJobRequest(name=self.id, owner=self._owner)
        return self._ask(self._calls.stub.GetJob, request, timeout_s)

    def progress(self, *, timeout_s: float | None = None) -> JobProgress:
        """Asks how far the job is.

        Args:
            timeout_s: Seconds for the call.

        Returns:
            The points that are computed, and how fast it goes.
        """
        return self.info(timeout_s=timeout_s).progress

    def done(self, *, timeout_s: float | None = None) -> bool:
        """Asks whether the job has succeeded, failed or been cancelled.

        Args:
            timeout_s: Seconds for the call.
        """
        return self._last.has_ended or self.info(timeout_s=timeout_s).has_ended

    def watch(self, *, patience_s: float = PATIENCE_S) -> Iterator[JobInfo]:
        """Follows the job until it ends.

        Args:
            patience_s: For how long the server or its storage may be away at a time,
                as when it is started anew: the job goes on then, and so does this.

        Yields:
            What the server says now, and again whenever the job has got further.

        Raises:
            UnavailableError: The server has been away for too long.
            PreconditionError: Its storage has; its reason is "STORAGE_UNAVAILABLE".
        """
        return self._news(patience_s, None)

    def wait(self, timeout_s: float | None = None) -> JobInfo:
        """Waits until the job has succeeded, failed or been cancelled.

        Args:
            timeout_s: Seconds to wait; None for as long as it takes.

        Returns:
            The job at its end.

        Raises:
            DeadlineError: It has not ended in this time; it goes on.
        """
        if not self._last.has_ended:
            for _ in self._news(PATIENCE_S, timeout_s):
                pass
        return self._last

    def result(self, timeout_s: float | None = None) -> Result:
        """Waits for the job, and reads the results of all points into memory.

        Args:
            timeout_s: Seconds for both; None for as long as it takes.

        Returns:
            The results, as of one batch.

        Raises:
            JacobianError: What the job has failed with.
            CancelledError: It was cancelled.
            DeadlineError: It has not ended in this time; it goes on.
        """
        stop = None if timeout_s is None else time.monotonic() + timeout_s
        self.wait(timeout_s).raise_unless_succeeded()
        # A timeout of the client's is for calls that take as long as a call does.
        left_s = math.inf if stop is None else max(0.0, stop - time.monotonic())
        return self._patiently(partial(self._read, 0, None, timeout_s=left_s))

    def read(
        self,
        start: int = 0,
        count: int | None = None,
        quantities: Quantities = None,
        *,
        timeout_s: float | None = None,
    ) -> Result:
        """Reads the results of a range of points, all of which must be computed.

        Args:
            start: The first point.
            count: How many; None for all from the first one.
            quantities: Which; None for all of the job's.
            timeout_s: Seconds for the call.

        Returns:
            Their results, as of one batch.

        Raises:
            PreconditionError: They are not all computed; its reason is
                "JOB_NOT_FINISHED".
        """
        return self._read(start, count, quantities, timeout_s=timeout_s)

    def chunks(
        self, start: int = 0, *, quantities: Quantities = None
    ) -> Iterator[Chunk]:
        """Reads the results of all points in order, as they get ready.

        Any number of points passes through a bounded memory. Whoever notes the `stop`
        of the last chunk goes on from there another time.

        Args:
            start: The first point.
            quantities: Which; None for all of the job's.

        Yields:
            Results of at most `chunk_size` points.

        Raises:
            JacobianError: What the job has failed with, after what it has computed.
            CancelledError: It was cancelled; likewise.
        """
        for info in self._news(PATIENCE_S, None):
            while stop := next_stop(start, info):
                read = partial(self._read, start, stop - start, quantities)
                yield Chunk(start, stop, self._patiently(read))
                start = stop
        self._last.raise_unless_succeeded()

    def __iter__(self) -> Iterator[Chunk]:
        """Takes `chunks()`."""
        return self.chunks()

    def save(
        self,
        path: str | Path,
        quantities: Quantities = None,
        *,
        count: int | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Waits for the job, and writes its results to a file, in bounded memory.

        Args:
            path: An .npy file for one array; an .npz file for any number, by labels
                such as "value['z'][0]", and `finite_points`; or a .parquet file, with
                a row for each point of at most 1024 numbers and with the same labels.
            quantities: Which; None for all of the job's.
            count: Only the first so many points, of a job in any state, all of which
                must be computed; it is not waited for then.
            on_progress: Is called with the points that are written, and all of them.

        Raises:
            ValueError: The file can't hold such results, or can't be written.
            ImportError: It is a Parquet file, and pyarrow is not installed.
            JacobianError: What the job has failed with.
        """
        path = Path(path)
        job_files.check_path(path)
        if count is None:
            info = self.wait()
            info.raise_unless_succeeded()
        else:
            info = self.info()
        total = info.progress.point_count if count is None else count

        def read(start: int, stop: int) -> Result:
            return self._patiently(
                partial(self._read, start, stop - start, quantities, keep_dense=True)
            )

        sample = read(0, 1)
        step = job_files.rows_at_once(sample, info.chunk_size)
        with ResultFile(path, total, sample) as file:
            for start in range(0, total, step):
                stop = min(start + step, total)
                file.write(read(start, stop))
                if on_progress is not None:
                    on_progress(stop, total)
            file.finish()

    def cancel(self, *, timeout_s: float | None = None) -> JobInfo:
        """Stops the job, after the points that are being computed.

        What is computed can be read. Does nothing to a job that has ended.

        Args:
            timeout_s: Seconds for the call.

        Returns:
            The job as it is then.
        """
        request = jobs_pb2.CancelJobRequest(name=self.id, owner=self._owner)
        return self._ask(self._calls.stub.CancelJob, request, timeout_s)

    def delete(self, *, timeout_s: float | None = None) -> None:
        """Stops the job and deletes it, with what the server keeps for it.

        Results that were put into an `output` stay.

        Args:
            timeout_s: Seconds for the call.
        """
        request = jobs_pb2.DeleteJobRequest(name=self.id, owner=self._owner)
        self._calls.ask(self._calls.stub.DeleteJob, request, timeout_s)

    def __repr__(self) -> str:
        """Shows what was last heard of it."""
        return f"<Job {self._last.headline}>"

    def _ask(
        self, call: Callable[..., jobs_pb2.Job], request: Any, timeout_s: float | None
    ) -> JobInfo:
        message = self._calls.ask(call, request, timeout_s)
        self._last = decode_job(message, self._calls.target)
        return self._last

    def _news(self, patience_s: float, timeout_s: float | None) -> Iterator[JobInfo]:
        news = News(
            self._last, self._calls.target, patience_s=patience_s, timeout_s=timeout_s
        )
        while True:
            error = None
            try:
                with closing(
                    self._calls.watch(self.id, self._owner, news.opens())
                ) as messages:
                    for message in messages:
                        if info := news.hears(message):
                            self._last = info
                            yield info
                            if info.has_ended:
                                return
            except JacobianError as caught:
                error = caught
            time.sleep(news.pause_s(error))

    def _read(
        self,
        start: int,
        count: int | None,
        quantities: Quantities = None,
        *,
        timeout_s: float | None = None,
        keep_dense: bool = False,
    ) -> Result:
        request = encode_read_request(self.id, start, count, quantities, self._owner)
        received = self._calls.read(request, timeout_s)
        return decode_rows(received, self._layout, keep_dense=keep_dense)

    def _patiently(self, read: Callable[[], Result]) -> Result:
        patience = Patience(PATIENCE_S)
        while True:
            try:
                return read()
            except JacobianError as error:
                if not passes(error):
                    raise
                time.sleep(patience.wait_s(error))
