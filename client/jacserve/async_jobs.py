"""Batch jobs, as the asyncio client has them: as in `jobs`, to be awaited."""

import asyncio
import math
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

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


class AsyncJobCalls:
    """The calls of JobService over a client's channel; see `JobCalls`."""

    def __init__(
        self, channel: grpc.aio.Channel, target: str, timeout_s: float | None
    ) -> None:
        """Prepares them."""
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

    async def submit(self, request: JobRequest, timeout_s: float | None) -> "AsyncJob":
        """Creates a job; sends it again while the server is away."""
        timeout_s = timeout_of(timeout_s, self._timeout_s)
        for pause_s in RESEND_AFTER_S:
            try:
                return await self._submit_once(request, timeout_s)
            except UnavailableError:
                await asyncio.sleep(pause_s)
        return await self._submit_once(request, timeout_s)

    async def _submit_once(
        self, request: JobRequest, timeout_s: float | None
    ) -> "AsyncJob":
        with translated(self.target):
            message = await self._create(request.to_parts(), timeout=timeout_s)
        return AsyncJob(self, message)

    async def find(self, id: str, owner: str, timeout_s: float | None) -> "AsyncJob":
        """Looks a job up by its id; see `Client.job`."""
        request = jobs_pb2.GetJobRequest(name=id, owner=owner)
        message = await self.ask(self.stub.GetJob, request, timeout_s)
        return AsyncJob(self, message, owner)

    async def list(
        self, states: str | Sequence[str], owner: str, timeout_s: float | None
    ) -> list[JobInfo]:
        """Lists jobs, page by page; see `Client.jobs`."""
        request = encode_list_request(states, owner)
        found: list[JobInfo] = []
        while True:
            page = await self.ask(self.stub.ListJobs, request, timeout_s)
            found += [decode_job(message, self.target) for message in page.jobs]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def ask(
        self, call: Callable[..., Awaitable[T]], request: Any, timeout_s: float | None
    ) -> T:
        """Makes a call that one message answers."""
        with translated(self.target):
            return await call(request, timeout=timeout_of(timeout_s, self._timeout_s))

    async def watch(
        self, id: str, owner: str, timeout_s: float
    ) -> AsyncGenerator[jobs_pb2.Job]:
        """Yields a job as it is now, and whenever it has got further."""
        with translated(self.target):
            request = jobs_pb2.WatchJobRequest(name=id, owner=owner)
            call: Any = self.stub.WatchJob(request, timeout=timeout_s)
            try:
                async for news in call:
                    yield news.job
            finally:
                call.cancel()  # It has ended, unless nobody listens any more.

    async def read(
        self, request: jobs_pb2.ReadJobResultRequest, timeout_s: float | None
    ) -> Received:
        """Reads results of a range of points."""
        receiver = Receiver(jobs_pb2.ReadJobResultResponse)
        with translated(self.target):
            call = self._read(request, timeout=timeout_of(timeout_s, self._timeout_s))
            try:
                async for raw in call:
                    receiver.feed(raw)
            finally:
                call.cancel()  # It has ended, unless something was raised.
        return receiver.received()


class AsyncJob:
    """A batch job on a server, as `AsyncClient` returns it; see `Job`.

    ```python
    job = await client.submit_job("spherical", np.load("points.npy", mmap_mode="r"))
    async for chunk in job:
        print(chunk.start, chunk.result.jacobian.shape)
    ```
    """

    def __init__(
        self, calls: AsyncJobCalls, message: jobs_pb2.Job, owner: str = ""
    ) -> None:
        """Takes a job that a server has returned."""
        self._calls = calls
        self._owner = owner
        self._last = decode_job(message, calls.target)
        self._layout: SparseLayout | None = sparse_layout_of(message.query)

    @property
    def id(self) -> str:
        """The id that `AsyncClient.job` finds it by."""
        return self._last.id

    async def info(self, *, timeout_s: float | None = None) -> JobInfo:
        """Asks how the job is; see `Job.info`."""
        request = jobs_pb2.GetJobRequest(name=self.id, owner=self._owner)
        return await self._ask(self._calls.stub.GetJob, request, timeout_s)

    async def progress(self, *, timeout_s: float | None = None) -> JobProgress:
        """Asks how far the job is; see `Job.progress`."""
        return (await self.info(timeout_s=timeout_s)).progress

    async def done(self, *, timeout_s: float | None = None) -> bool:
        """Asks whether the job has ended; see `Job.done`."""
        return self._last.has_ended or (await self.info(timeout_s=timeout_s)).has_ended

    def watch(self, *, patience_s: float = PATIENCE_S) -> AsyncIterator[JobInfo]:
        """Follows the job until it ends; see `Job.watch`."""
        return self._news(patience_s, None)

    async def wait(self, timeout_s: float | None = None) -> JobInfo:
        """Waits until the job has ended; see `Job.wait`."""
        if not self._last.has_ended:
            async for _ in self._news(PATIENCE_S, timeout_s):
                pass
        return self._last

    async def result(self, timeout_s: float | None = None) -> Result:
        """Waits for the job, and reads all of its results; see `Job.result`."""
        stop = None if timeout_s is None else time.monotonic() + timeout_s
        (await self.wait(timeout_s)).raise_unless_succeeded()
        # A timeout of the client's is for calls that take as long as a call does.
        left_s = math.inf if stop is None else max(0.0, stop - time.monotonic())
        return await self._patiently(partial(self._read, 0, None, timeout_s=left_s))

    async def read(
        self,
        start: int = 0,
        count: int | None = None,
        quantities: Quantities = None,
        *,
        timeout_s: float | None = None,
    ) -> Result:
        """Reads the results of a range of points; see `Job.read`."""
        return await self._read(start, count, quantities, timeout_s=timeout_s)

    async def chunks(
        self, start: int = 0, *, quantities: Quantities = None
    ) -> AsyncIterator[Chunk]:
        """Reads the results in order, as they get ready; see `Job.chunks`."""
        async with aclosing(self._news(PATIENCE_S, None)) as news:
            async for info in news:
                while stop := next_stop(start, info):
                    read = partial(self._read, start, stop - start, quantities)
                    yield Chunk(start, stop, await self._patiently(read))
                    start = stop
        self._last.raise_unless_succeeded()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Takes `chunks()`."""
        return self.chunks()

    async def save(
        self,
        path: str | Path,
        quantities: Quantities = None,
        *,
        count: int | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Waits for the job, and writes its results to a file; see `Job.save`."""
        path = Path(path)
        job_files.check_path(path)
        if count is None:
            info = await self.wait()
            info.raise_unless_succeeded()
        else:
            info = await self.info()
        total = info.progress.point_count if count is None else count

        async def read(start: int, stop: int) -> Result:
            return await self._patiently(
                partial(self._read, start, stop - start, quantities, keep_dense=True)
            )

        sample = await read(0, 1)
        step = job_files.rows_at_once(sample, info.chunk_size)
        with ResultFile(path, total, sample) as file:
            for start in range(0, total, step):
                stop = min(start + step, total)
                # Disks are slow, and the loop has others to serve.
                await asyncio.to_thread(file.write, await read(start, stop))
                if on_progress is not None:
                    on_progress(stop, total)
            await asyncio.to_thread(file.finish)

    async def cancel(self, *, timeout_s: float | None = None) -> JobInfo:
        """Stops the job; see `Job.cancel`."""
        request = jobs_pb2.CancelJobRequest(name=self.id, owner=self._owner)
        return await self._ask(self._calls.stub.CancelJob, request, timeout_s)

    async def delete(self, *, timeout_s: float | None = None) -> None:
        """Stops the job and deletes it; see `Job.delete`."""
        request = jobs_pb2.DeleteJobRequest(name=self.id, owner=self._owner)
        await self._calls.ask(self._calls.stub.DeleteJob, request, timeout_s)

    def __repr__(self) -> str:
        """Shows what was last heard of it."""
        return f"<AsyncJob {self._last.headline}>"

    async def _ask(
        self,
        call: Callable[..., Awaitable[jobs_pb2.Job]],
        request: Any,
        timeout_s: float | None,
    ) -> JobInfo:
        message = await self._calls.ask(call, request, timeout_s)
        self._last = decode_job(message, self._calls.target)
        return self._last

    async def _news(
        self, patience_s: float, timeout_s: float | None
    ) -> AsyncGenerator[JobInfo]:
        news = News(
            self._last, self._calls.target, patience_s=patience_s, timeout_s=timeout_s
        )
        while True:
            error = None
            try:
                async with aclosing(
                    self._calls.watch(self.id, self._owner, news.opens())
                ) as messages:
                    async for message in messages:
                        if info := news.hears(message):
                            self._last = info
                            yield info
                            if info.has_ended:
                                return
            except JacobianError as caught:
                error = caught
            await asyncio.sleep(news.pause_s(error))

    async def _read(
        self,
        start: int,
        count: int | None,
        quantities: Quantities = None,
        *,
        timeout_s: float | None = None,
        keep_dense: bool = False,
    ) -> Result:
        request = encode_read_request(self.id, start, count, quantities, self._owner)
        received = await self._calls.read(request, timeout_s)
        return decode_rows(received, self._layout, keep_dense=keep_dense)

    async def _patiently(self, read: Callable[[], Awaitable[Result]]) -> Result:
        patience = Patience(PATIENCE_S)
        while True:
            try:
                return await read()
            except JacobianError as error:
                if not passes(error):
                    raise
                await asyncio.sleep(patience.wait_s(error))
