"""The asyncio client: the same calls as `Client`, to be awaited."""

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import Any, Self, Unpack

from jacserve.async_jobs import AsyncJob, AsyncJobCalls
from jacserve.channels import EVALUATE, EVALUATE_STREAM, GET_SPARSITY
from jacserve.checking import Check, checks, named_arrays
from jacserve.connection import ConnectOptions, connection
from jacserve.errors import JacobianError, translated
from jacserve.evaluation import (
    Answer,
    Memory,
    Receiver,
    Step,
    drive_async,
    evaluation,
)
from jacserve.functions import (
    FunctionInfo,
    Sparsity,
    decode_function,
    decode_sparsity,
)
from jacserve.job_messages import JobInfo, OnError, encode_job
from jacserve.queries import (
    EvaluateOptions,
    Inputs,
    JobInputs,
    JobOptions,
    Options,
    QueryEncoder,
    encode_sparsity_request,
    timeout_of,
)
from jacserve.results import Result
from jacserve.server_status import ServerStatus, decode_status
from jacserve.tensors import Array
from jacserve.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    jacobian_pb2 as pb,
    jacobian_pb2_grpc as pb_grpc,
)
from jacserve.vocabulary import JobState, Quantity


class AsyncClient:
    """Asks a server for Jacobians from an event loop.

    Its methods take the arguments of `Client`'s and raise the same errors.

    ```python
    async with jacserve.AsyncClient("localhost:50051") as client:
        jac = await client.jacobian("spherical", np.array([2.0, 0.5, 1.0]))
    ```
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Prepares a connection; the first call makes it. See `Client`.

        Args:
            target: The server's address, or those of several.
            timeout_s: The timeout of calls that name none, in seconds.
            **options: As for `Client`.
        """
        self._connection = connection(target, options)
        self._target = self._connection.name
        self._timeout_s = timeout_s
        self._channel = self._connection.async_channel()
        self._stub = pb_grpc.JacobianServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        # Messages with tensors are read and written by jacserve itself.
        self._evaluate: Any = self._channel.unary_unary(EVALUATE)
        self._evaluate_stream: Any = self._channel.stream_stream(EVALUATE_STREAM)
        self._get_sparsity: Any = self._channel.unary_unary(
            GET_SPARSITY, pb.GetSparsityRequest.SerializeToString
        )
        self._encoder = QueryEncoder()
        self._memory = Memory()
        self._jobs = AsyncJobCalls(self._channel, self._target, timeout_s)

    async def __aenter__(self) -> Self:
        """Returns the client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        await self._channel.close()

    async def functions(self, *, timeout_s: float | None = None) -> list[FunctionInfo]:
        """Lists the registered functions; see `Client.functions`."""
        found: list[FunctionInfo] = []
        request = pb.ListFunctionsRequest()
        while True:
            with translated(self._target):
                page = await self._stub.ListFunctions(
                    request, timeout=timeout_of(timeout_s, self._timeout_s)
                )
            found.extend(map(decode_function, page.functions))
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def describe(
        self, function: str, *, timeout_s: float | None = None
    ) -> FunctionInfo:
        """Describes one function; see `Client.describe`."""
        request = pb.GetFunctionRequest(name=function)
        with translated(self._target):
            found = await self._stub.GetFunction(
                request, timeout=timeout_of(timeout_s, self._timeout_s)
            )
        return decode_function(found)

    async def status(self, *, timeout_s: float | None = None) -> ServerStatus:
        """Tells how the server is; see `Client.status`."""
        with translated(self._target):
            found = await self._admin.GetStatus(
                admin_pb2.GetStatusRequest(),
                timeout=timeout_of(timeout_s, self._timeout_s),
            )
        return decode_status(found)

    async def release(
        self, function: str, *, timeout_s: float | None = None
    ) -> FunctionInfo:
        """Has a function run again that is in quarantine; see `Client.release`."""
        request = admin_pb2.ReleaseFunctionRequest(name=function)
        with translated(self._target):
            found = await self._admin.ReleaseFunction(
                request, timeout=timeout_of(timeout_s, self._timeout_s)
            )
        return decode_function(found)

    async def sparsity(
        self,
        function: str,
        *,
        sizes: Mapping[str, int] | None = None,
        wrt: str | Sequence[str] = (),
        quantity: Quantity = "jacobian",
        timeout_s: float | None = None,
    ) -> Sparsity:
        """Finds where J or H can be other than zero; see `Client.sparsity`."""
        request = encode_sparsity_request(function, sizes or {}, wrt, quantity)
        with translated(self._target):
            found: bytes = await self._get_sparsity(
                request, timeout=timeout_of(timeout_s, self._timeout_s)
            )
        return decode_sparsity(found)

    async def check(
        self,
        function: str,
        inputs: Inputs | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        points: int = 3,
        seed: int = 0,
        timeout_s: float | None = None,
    ) -> list[Check]:
        """Compares every derivative with differences; see `Client.check`."""
        info = await self.describe(function, timeout_s=timeout_s)
        asking = checks(
            info,
            inputs=None if inputs is None else named_arrays(inputs, info),
            sizes=sizes or {},
            points=points,
            seed=seed,
        )
        answer: Result | JacobianError | None = None
        while True:
            try:
                ask = asking.send(answer) if answer else next(asking)
            except StopIteration as stop:
                return stop.value
            try:
                answer = await self.evaluate(
                    function,
                    ask.inputs,
                    quantities=ask.quantities,
                    timeout_s=timeout_s,
                    **ask.options,
                )
            except JacobianError as error:
                answer = error

    async def evaluate(
        self,
        function: str,
        inputs: Inputs,
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        **options: Unpack[EvaluateOptions],
    ) -> Result:
        """Evaluates any set of quantities; see `Client.evaluate`."""
        ask = self._encoder.encode(function, inputs, quantities, options)
        steps = evaluation(
            ask,
            self._memory,
            timeout_s=timeout_of(options.get("timeout_s"), self._timeout_s),
            retries=self._connection.retries,
        )
        return await drive_async(steps, self._send)

    def map(
        self,
        function: str,
        batches: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        window: int = 2,
        **options: Unpack[EvaluateOptions],
    ) -> AsyncIterator[Result]:
        """Evaluates batch after batch, in order; see `Client.map`."""
        if window < 1:
            raise ValueError(f"window is {window}; pass 1 or more")

        def evaluate(inputs: Inputs) -> Coroutine[Any, Any, Result]:
            return self.evaluate(function, inputs, quantities=quantities, **options)

        return _in_order(evaluate, batches, window)

    async def submit_job(
        self,
        function: str,
        inputs: JobInputs,
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        id: str | None = None,
        batch_size: int | None = None,
        output: str | None = None,
        ttl_s: float | None = None,
        on_error: OnError = "record",
        timeout_s: float | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJob:
        """Submits a batch job; see `Client.submit_job`."""
        request = encode_job(
            function,
            inputs,
            quantities,
            options,
            id=id,
            batch_size=batch_size,
            output=output,
            ttl_s=ttl_s,
            on_error=on_error,
        )
        return await self._jobs.submit(request, timeout_s)

    async def job(
        self, id: str, *, owner: str = "", timeout_s: float | None = None
    ) -> AsyncJob:
        """Finds a job, wherever it was submitted from; see `Client.job`."""
        return await self._jobs.find(id, owner, timeout_s)

    async def jobs(
        self,
        states: JobState | Sequence[JobState] = (),
        *,
        owner: str = "",
        timeout_s: float | None = None,
    ) -> list[JobInfo]:
        """Lists the caller's jobs, the newest first; see `Client.jobs`."""
        return await self._jobs.list(states, owner, timeout_s)

    async def _send(self, step: Step) -> Answer:
        ask, timeout_s = step.ask, step.timeout_s
        if step.delay_s:
            await asyncio.sleep(step.delay_s)
        with translated(self._target):
            if not step.is_streamed:
                return await self._evaluate(ask.to_bytes(), timeout=timeout_s)
            receiver = Receiver()
            call: Any = self._evaluate_stream(ask.to_parts(), timeout=timeout_s)
            try:
                async for raw in call:
                    receiver.feed(raw)
            finally:
                call.cancel()  # It has ended already, unless something was raised.
            return receiver.received()

    async def value(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates f(x); see `Client.value`."""
        return (
            await self.evaluate(function, inputs, quantities="value", **options)
        ).value

    async def jacobian(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates the Jacobian [m, n]; see `Client.jacobian`."""
        return (
            await self.evaluate(function, inputs, quantities="jacobian", **options)
        ).jacobian

    async def value_and_jacobian(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> tuple[Any, Any]:
        """Evaluates f(x) and J in one pass."""
        result = await self.evaluate(
            function, inputs, quantities=("value", "jacobian"), **options
        )
        return result.value, result.jacobian

    async def gradient(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates the gradient [n] of a scalar function."""
        return (
            await self.evaluate(function, inputs, quantities="gradient", **options)
        ).gradient

    async def value_and_gradient(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> tuple[Any, Any]:
        """Evaluates a scalar function and its gradient [n] in one pass."""
        result = await self.evaluate(
            function, inputs, quantities=("value", "gradient"), **options
        )
        return result.value, result.gradient

    async def determinant(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates det J of a function with m = n."""
        return (
            await self.evaluate(function, inputs, quantities="determinant", **options)
        ).determinant

    async def abs_determinant(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates |det J|, the factor of a change of variables."""
        return (
            await self.evaluate(
                function, inputs, quantities="abs_determinant", **options
            )
        ).abs_determinant

    async def slogdet(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> tuple[Array, Array]:
        """Evaluates the sign of det J and log |det J|, which can't overflow."""
        return (
            await self.evaluate(function, inputs, quantities="slogdet", **options)
        ).slogdet

    async def jvp(
        self,
        function: str,
        inputs: Inputs,
        tangents: Inputs,
        **options: Unpack[Options],
    ) -> Any:
        """Evaluates J v [m], by forward mode."""
        return (
            await self.evaluate(
                function, inputs, quantities="jvp", tangents=tangents, **options
            )
        ).jvp

    async def vjp(
        self,
        function: str,
        inputs: Inputs,
        cotangents: Any,
        **options: Unpack[Options],
    ) -> Any:
        """Evaluates u^T J [n], by reverse mode."""
        return (
            await self.evaluate(
                function, inputs, quantities="vjp", cotangents=cotangents, **options
            )
        ).vjp

    async def hessian(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates the Hessian H [n, n] of a scalar function."""
        return (
            await self.evaluate(function, inputs, quantities="hessian", **options)
        ).hessian

    async def hvp(
        self,
        function: str,
        inputs: Inputs,
        tangents: Inputs,
        **options: Unpack[Options],
    ) -> Any:
        """Evaluates H v [n] of a scalar function."""
        return (
            await self.evaluate(
                function, inputs, quantities="hvp", tangents=tangents, **options
            )
        ).hvp

    async def newton_step(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates s [n] with J s = -f(x), by least squares when m != n."""
        return (
            await self.evaluate(function, inputs, quantities="newton_step", **options)
        ).newton_step

    async def singular_values(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates the singular values of J, the largest first."""
        return (
            await self.evaluate(
                function, inputs, quantities="singular_values", **options
            )
        ).singular_values

    async def condition_number(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates the largest singular value of J over the smallest."""
        return (
            await self.evaluate(
                function, inputs, quantities="condition_number", **options
            )
        ).condition_number


async def _in_order(
    evaluate: Callable[[Inputs], Coroutine[Any, Any, Result]],
    batches: Iterable[Inputs] | AsyncIterable[Inputs],
    window: int,
) -> AsyncGenerator[Result]:
    """Yields results in the order of batches, of which `window` are on their way."""
    pending: deque[asyncio.Task[Result]] = deque()
    source, failure = _aiter(batches), None
    is_dry = False
    try:
        while True:
            while not is_dry and len(pending) < window:
                try:
                    call = evaluate(await anext(source))
                except StopAsyncIteration:
                    is_dry = True
                except Exception as error:  # Those before it have their results.
                    is_dry, failure = True, error
                else:
                    pending.append(asyncio.create_task(call))
            if not pending:
                break
            yield await pending.popleft()
        if failure is not None:
            raise failure
    finally:
        for task in pending:
            task.cancel()


async def _aiter(
    batches: Iterable[Inputs] | AsyncIterable[Inputs],
) -> AsyncIterator[Inputs]:
    if isinstance(batches, AsyncIterable):
        async for inputs in batches:
            yield inputs
    else:
        for inputs in batches:
            yield inputs
