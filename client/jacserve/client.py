"""The blocking client."""

import threading
import time
from collections import deque
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack, cast

import grpc

from jacserve.channels import EVALUATE, EVALUATE_STREAM, GET_SPARSITY, SESSION
from jacserve.checking import Check, checks, named_arrays
from jacserve.connection import ConnectOptions, connection
from jacserve.errors import JacobianError, from_rpc_error, translated
from jacserve.evaluation import Answer, Memory, Receiver, Step, drive, evaluation
from jacserve.evaluator import Evaluator
from jacserve.functions import (
    FunctionInfo,
    Sparsity,
    decode_function,
    decode_sparsity,
)
from jacserve.job_messages import JobInfo, OnError, encode_job
from jacserve.jobs import Job, JobCalls
from jacserve.queries import (
    Ask,
    EvaluateOptions,
    Inputs,
    JobInputs,
    JobOptions,
    QueryEncoder,
    encode_sparsity_request,
    timeout_of,
)
from jacserve.results import Result
from jacserve.server_status import ServerStatus, decode_status
from jacserve.session import Session
from jacserve.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    jacobian_pb2 as pb,
    jacobian_pb2_grpc as pb_grpc,
)
from jacserve.vocabulary import JobState, Quantity


class Client(Evaluator):
    """Asks a server for Jacobians, from any number of threads.

    Every method that evaluates takes the same two arguments and the same keyword
    options:

    - `function`: A registered name, such as "spherical", or "spherical@2" for one
      version.
    - `inputs`: One array; a tuple of arrays in declared order; or a mapping of
      arrays by argument name. An argument with one axis more than declared is a
      batch of b points, and every array of the answer then has a leading axis b;
      one without is shared by the whole batch. Dtypes are never changed.
    - `wrt`, `mode`, `layout`, `cast`, `require_finite`, `timeout_s`: see
      `jacserve.queries.Options`.

    They return arrays of the function's dtype, writable and the caller's own.

    All raise JacobianError or one of its kinds: InvalidRequestError, a ValueError,
    for bad arguments; NotFoundError, a LookupError, for unknown functions;
    DeadlineError, a TimeoutError, when timeout_s has passed; UnavailableError, a
    ConnectionError, when no server answers.

    ```python
    with jacserve.Client("localhost:50051") as client:
        jac = client.jacobian("spherical", np.array([2.0, 0.5, 1.0]))
    ```
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Prepares a connection; the first call makes it.

        Args:
            target: The server's address, HOST:PORT. Several share the calls: each call
                goes to one of those that are ready. By default what JACSERVE_TARGET
                has, with commas between; else "localhost:50051".
            timeout_s: The timeout of calls that name none, in seconds.
            **options: Token, certificates and retries; see
                `jacserve.connection.ConnectOptions`.

        Raises:
            ValueError: The options contradict each other, can't be read, or would
                have a token sent where others can read it.
            UnavailableError: None of several targets has an address.
        """
        self._connection = connection(target, options)
        self._target = self._connection.name
        self._timeout_s = timeout_s
        self._channel = self._connection.channel()
        self._stub = pb_grpc.JacobianServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        # Messages with tensors are read and written by jacserve itself.
        self._evaluate: Any = self._channel.unary_unary(EVALUATE)
        self._evaluate_stream: Any = self._channel.stream_stream(EVALUATE_STREAM)
        self._session: Any = self._channel.stream_stream(SESSION)
        self._get_sparsity: Any = self._channel.unary_unary(
            GET_SPARSITY, pb.GetSparsityRequest.SerializeToString
        )
        self._encoder = QueryEncoder()
        self._memory = Memory()
        self._jobs = JobCalls(self._channel, self._target, timeout_s)

    def __enter__(self) -> Self:
        """Returns the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        self.close()

    def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        self._channel.close()

    def functions(self, *, timeout_s: float | None = None) -> list[FunctionInfo]:
        """Lists the registered functions, ordered by name, then version.

        Args:
            timeout_s: Seconds for each page of the list.

        Returns:
            The functions.
        """
        return list(self._list_functions(timeout_s))

    def _list_functions(self, timeout_s: float | None) -> Iterator[FunctionInfo]:
        request = pb.ListFunctionsRequest()
        while True:
            with translated(self._target):
                page = self._stub.ListFunctions(
                    request, timeout=timeout_of(timeout_s, self._timeout_s)
                )
            yield from map(decode_function, page.functions)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def describe(
        self, function: str, *, timeout_s: float | None = None
    ) -> FunctionInfo:
        """Describes one function.

        Args:
            function: Its name; with a version, or without for the newest.
            timeout_s: Seconds for the call.

        Returns:
            Its signature, dtypes, modes and documentation.

        Raises:
            NotFoundError: No function has that name and version.
        """
        request = pb.GetFunctionRequest(name=function)
        with translated(self._target):
            found = self._stub.GetFunction(
                request, timeout=timeout_of(timeout_s, self._timeout_s)
            )
        return decode_function(found)

    def status(self, *, timeout_s: float | None = None) -> ServerStatus:
        """Tells how the server is, for whoever runs it.

        Needs the scope "admin" where there are tokens. Of several targets one answers.

        Args:
            timeout_s: Seconds for the call.

        Returns:
            Its devices, load, programs, functions, jobs and workers.

        Raises:
            AccessError: Who calls may not.
        """
        with translated(self._target):
            found = self._admin.GetStatus(
                admin_pb2.GetStatusRequest(),
                timeout=timeout_of(timeout_s, self._timeout_s),
            )
        return decode_status(found)

    def release(self, function: str, *, timeout_s: float | None = None) -> FunctionInfo:
        """Has a function run again that is in quarantine.

        Does nothing to any other. Needs the scope "admin" where there are tokens.

        Args:
            function: Its name; with a version, or without for the newest.
            timeout_s: Seconds for the call.

        Returns:
            Its description.

        Raises:
            NotFoundError: No function has that name and version.
            AccessError: Who calls may not.
        """
        request = admin_pb2.ReleaseFunctionRequest(name=function)
        with translated(self._target):
            found = self._admin.ReleaseFunction(
                request, timeout=timeout_of(timeout_s, self._timeout_s)
            )
        return decode_function(found)

    def sparsity(
        self,
        function: str,
        *,
        sizes: Mapping[str, int] | None = None,
        wrt: str | Sequence[str] = (),
        quantity: Quantity = "jacobian",
        timeout_s: float | None = None,
    ) -> Sparsity:
        """Finds where J or H can be other than zero, whatever the point.

        Args:
            function: Its name.
            sizes: Sizes of its symbolic dimensions; 32 for those left out.
            wrt: Names of the arguments to differentiate with respect to; all by
                default.
            quantity: "jacobian", or "hessian" of a scalar function.
            timeout_s: Seconds for the call.

        Returns:
            The pattern, and how many products give the whole matrix.

        Raises:
            InvalidRequestError: The sparsity can't be found; the message says why.
            PreconditionError: The server has no jacserve[sparse].
        """
        request = encode_sparsity_request(function, sizes or {}, wrt, quantity)
        with translated(self._target):
            found: bytes = self._get_sparsity(
                request, timeout=timeout_of(timeout_s, self._timeout_s)
            )
        return decode_sparsity(found)

    def check(
        self,
        function: str,
        inputs: Inputs | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        points: int = 3,
        seed: int = 0,
        timeout_s: float | None = None,
    ) -> list[Check]:
        """Compares every derivative of a function with differences of its values.

        Args:
            function: Its name.
            inputs: The point to compare at; random ones where it is left out.
            sizes: Sizes of its symbolic dimensions, for random points.
            points: How many random points, each with a random direction.
            seed: Of the random numbers.
            timeout_s: Seconds for each call.

        Returns:
            A check for each dtype and derivative; see `jacserve.Check`.

        Raises:
            JacobianError: A call failed, other than by refusing the derivative.
        """
        info = self.describe(function, timeout_s=timeout_s)
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
                answer = self.evaluate(
                    function,
                    ask.inputs,
                    quantities=ask.quantities,
                    timeout_s=timeout_s,
                    **ask.options,
                )
            except JacobianError as error:
                answer = error

    def evaluate(
        self,
        function: str,
        inputs: Inputs,
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        **options: Unpack[EvaluateOptions],
    ) -> Result:
        """Evaluates any set of quantities, in one pass of one compiled program.

        Args:
            function: A registered name.
            inputs: One array, a tuple in declared order, or a mapping by name.
            quantities: What to compute; see `jacserve.Result` for each.
            **options: See `jacserve.queries.EvaluateOptions`.

        Returns:
            The quantities, with the mode that ran and the server's timing.

        Raises:
            JacobianError: The call failed; see this class.
        """
        ask = self._encoder.encode(function, inputs, quantities, options)
        return drive(self._evaluation(ask, options), self._send)

    def map(
        self,
        function: str,
        batches: Iterable[Inputs],
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        window: int = 2,
        **options: Unpack[EvaluateOptions],
    ) -> Iterator[Result]:
        """Evaluates batch after batch, and yields the results in the same order.

        Batches are taken from the iterable as results are taken from the iterator, so
        that any number of points passes through a bounded memory: at most `window`
        batches and their results are on their way.

        Args:
            function: A registered name.
            batches: Inputs, each as `evaluate` takes them.
            quantities: As for `evaluate`.
            window: How many batches are on their way at once; 2 or more keep the
                server busy while results travel.
            **options: As for `evaluate`; timeout_s is for each batch.

        Yields:
            The result of each batch.

        Raises:
            JacobianError: A call failed; the batches before it have been yielded.
        """
        if window < 1:
            raise ValueError(f"window is {window}; pass 1 or more")
        calls = _Calls()

        def evaluate(inputs: Inputs) -> Result:
            ask = self._encoder.encode(function, inputs, quantities, options)
            return drive(
                self._evaluation(ask, options), partial(self._send, calls=calls)
            )

        return _in_order(evaluate, batches, window, calls)

    def session(self, *, window: int = 64) -> Session:
        """Opens a session: many calls over one stream, each cheaper than one alone.

        ```python
        with client.session() as session:
            for _ in range(20):
                x += session.newton_step("equations", x)
        ```

        Args:
            window: How many queries that were submitted may be without an answer.

        Returns:
            The session, with the client's methods that evaluate, and `submit`. Close
            it, or use it in a with block, before the client is closed.
        """
        return Session(
            self._session,
            self._send,
            encoder=self._encoder,
            memory=self._memory,
            target=self._target,
            timeout_s=self._timeout_s,
            retries=self._connection.retries,
            window=window,
        )

    def submit_job(
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
    ) -> Job:
        """Submits a batch job: a query about more points than one call carries.

        The server computes it chunk by chunk, keeps what is computed, and goes on by
        itself after it was started anew.

        Args:
            function: A registered name.
            inputs: As for `evaluate`. An array may also be the `pathlib.Path` of an
                .npy file, and all of them that of an .npz file, by name, which is
                mapped into memory and sent piece by piece; or a `Source`, which the
                server reads from its storage.
            quantities: As for `evaluate`.
            id: Its id, of up to 63 letters, digits, "-", "_" and "."; None for a new
                one. To submit the same again with the same id returns the job that
                there is.
            batch_size: The points to compute at once; None has the server measure
                what is best.
            output: Where the results go: a storage root of the server and the path of
                a new Zarr store in it, such as "results/night-1.zarr". None for the
                server's own.
            ttl_s: Seconds that the job is kept after it has ended; None for the
                server's default.
            on_error: "record" counts the points that give NaN or Inf and marks them in
                `Result.finite_points`; "fail" has the first of them fail the job.
            timeout_s: Seconds to send the points in; the call is repeated while the
                server is away.
            **options: See `jacserve.queries.JobOptions`.

        Returns:
            The job, which may be queued yet.

        Raises:
            InvalidRequestError: A word, an array or a source is wrong.
            PreconditionError: Another job has that id, of reason "JOB_ALREADY_EXISTS".
            CapacityError: The server keeps as many jobs as it may.
        """
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
        return self._jobs.submit(request, timeout_s)

    def job(self, id: str, *, owner: str = "", timeout_s: float | None = None) -> Job:
        """Finds a job, wherever it was submitted from.

        Args:
            id: Its id.
            owner: Whose it is, as `JobInfo.owner` says, where it is not the caller's
                own; for administrators.
            timeout_s: Seconds for the call.

        Returns:
            The job.

        Raises:
            NotFoundError: No job has that id, or not that owner.
        """
        return self._jobs.find(id, owner, timeout_s)

    def jobs(
        self,
        states: JobState | Sequence[JobState] = (),
        *,
        owner: str = "",
        timeout_s: float | None = None,
    ) -> list[JobInfo]:
        """Lists the caller's jobs, the newest first.

        Args:
            states: Only those in these states; all by default.
            owner: Whose, as `JobInfo.owner` says, or "nobody" where that is empty; "-"
                for everybody's; for administrators.
            timeout_s: Seconds for each page of the list.

        Returns:
            What the server says of each.
        """
        return self._jobs.list(states, owner, timeout_s)

    def _evaluation(
        self, ask: Ask, options: EvaluateOptions
    ) -> Generator[Step, Answer, Result]:
        return evaluation(
            ask,
            self._memory,
            timeout_s=timeout_of(options.get("timeout_s"), self._timeout_s),
            retries=self._connection.retries,
        )

    def _send(self, step: Step, calls: "_Calls | None" = None) -> Answer:
        ask, timeout_s = step.ask, step.timeout_s
        if step.delay_s:
            time.sleep(step.delay_s)
        try:
            if not step.is_streamed:
                if calls is None:
                    return self._evaluate(ask.to_bytes(), timeout=timeout_s)
                call = self._evaluate.future(ask.to_bytes(), timeout=timeout_s)
                with calls.holding(call):
                    return call.result()
            receiver = Receiver()
            call = self._evaluate_stream(ask.to_parts(), timeout=timeout_s)
            with calls.holding(call) if calls else nullcontext():
                try:
                    for raw in call:
                        receiver.feed(raw)
                finally:
                    call.cancel()  # It has ended, unless something was raised.
            return receiver.received()
        except grpc.RpcError as error:
            raise from_rpc_error(cast("grpc.Call", error), self._target) from error


class _Calls:
    """The calls of one iteration that are on their way, to be cancelled with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Any] = set()
        self._is_over = False

    @contextmanager
    def holding(self, call: Any) -> Generator[None]:
        """Cancels a call if the iteration ends within the block."""
        with self._lock:
            self._running.add(call)
            is_over = self._is_over
        if is_over:
            call.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(call)

    def cancel(self) -> None:
        """Ends the iteration."""
        with self._lock:
            self._is_over = True
            running = tuple(self._running)
        for call in running:
            call.cancel()


def _in_order(
    evaluate: Callable[[Inputs], Result],
    batches: Iterable[Inputs],
    window: int,
    calls: _Calls,
) -> Generator[Result]:
    """Yields results in the order of batches, of which `window` are on their way."""
    pool = ThreadPoolExecutor(window, "jacserve-map")
    pending: deque[Future[Result]] = deque()
    source, failure = iter(batches), None
    is_dry = False
    try:
        while True:
            while not is_dry and len(pending) < window:
                try:
                    pending.append(pool.submit(evaluate, next(source)))
                except StopIteration:
                    is_dry = True
                except Exception as error:  # Those before it have their results.
                    is_dry, failure = True, error
            if not pending:
                break
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        calls.cancel()
        pool.shutdown(wait=False, cancel_futures=True)
