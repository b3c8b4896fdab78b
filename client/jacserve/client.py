"""The blocking client."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from jacserve.channels import DEFAULT_TARGET, channel_options
from jacserve.checking import Check, checks, named_arrays
from jacserve.errors import JacobianError, PreconditionError, translated
from jacserve.functions import (
    FunctionInfo,
    Sparsity,
    decode_function,
    decode_sparsity,
)
from jacserve.queries import (
    EvaluateOptions,
    Inputs,
    Options,
    encode_query,
    encode_sparsity_request,
    timeout_of,
)
from jacserve.results import Result, decode_result
from jacserve.sparse import PatternCache
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve.vocabulary import Quantity


class Client:
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
        self, target: str = DEFAULT_TARGET, *, timeout_s: float | None = None
    ) -> None:
        """Prepares a connection; the first call makes it.

        Args:
            target: The server's address.
            timeout_s: The timeout of calls that name none, in seconds.
        """
        self._target = target
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(target, options=channel_options(target))
        self._stub = pb_grpc.JacobianServiceStub(self._channel)
        self._patterns = PatternCache()

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
            found = self._stub.GetSparsity(
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
        query = encode_query(function, inputs, quantities, options)
        timeout = timeout_of(options.get("timeout_s"), self._timeout_s)
        known = self._patterns.name_in(query)
        try:
            with translated(self._target):
                answer = self._stub.Evaluate(query, timeout=timeout)
        except PreconditionError as error:
            known = self._patterns.recover(query, error)
            with translated(self._target):
                answer = self._stub.Evaluate(query, timeout=timeout)
        result = decode_result(answer, query, known)
        self._patterns.learn(query, answer, result.patterns)
        return result

    def value(self, function: str, inputs: Inputs, **options: Unpack[Options]) -> Any:
        """Evaluates f(x): an array, or what arrays the function returns."""
        return self.evaluate(function, inputs, quantities="value", **options).value

    def jacobian(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates the Jacobian J [m, n], J[i, j] = d f_i / d x_j.

        In the blocks layout, arrays shaped like the result and then the argument.
        """
        return self.evaluate(
            function, inputs, quantities="jacobian", **options
        ).jacobian

    def value_and_jacobian(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> tuple[Any, Any]:
        """Evaluates f(x) and J in one pass."""
        result = self.evaluate(
            function, inputs, quantities=("value", "jacobian"), **options
        )
        return result.value, result.jacobian

    def gradient(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates the gradient [n] of a scalar function."""
        return self.evaluate(
            function, inputs, quantities="gradient", **options
        ).gradient

    def value_and_gradient(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> tuple[Any, Any]:
        """Evaluates a scalar function and its gradient [n] in one pass."""
        result = self.evaluate(
            function, inputs, quantities=("value", "gradient"), **options
        )
        return result.value, result.gradient

    def determinant(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates det J of a function with m = n."""
        return self.evaluate(
            function, inputs, quantities="determinant", **options
        ).determinant

    def abs_determinant(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates |det J|, the factor of a change of variables."""
        return self.evaluate(
            function, inputs, quantities="abs_determinant", **options
        ).abs_determinant

    def slogdet(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> tuple[Array, Array]:
        """Evaluates the sign of det J and log |det J|, which can't overflow."""
        return self.evaluate(function, inputs, quantities="slogdet", **options).slogdet

    def jvp(
        self,
        function: str,
        inputs: Inputs,
        tangents: Inputs,
        **options: Unpack[Options],
    ) -> Any:
        """Evaluates J v [m], by forward mode.

        `tangents` is v, [n] or [k, n] for k at once; see EvaluateOptions.
        """
        return self.evaluate(
            function, inputs, quantities="jvp", tangents=tangents, **options
        ).jvp

    def vjp(
        self,
        function: str,
        inputs: Inputs,
        cotangents: Any,
        **options: Unpack[Options],
    ) -> Any:
        """Evaluates u^T J [n], by reverse mode.

        `cotangents` is u, [m] or [k, m] for k at once; see EvaluateOptions.
        """
        return self.evaluate(
            function, inputs, quantities="vjp", cotangents=cotangents, **options
        ).vjp

    def hessian(self, function: str, inputs: Inputs, **options: Unpack[Options]) -> Any:
        """Evaluates the Hessian H [n, n] of a scalar function.

        In the blocks layout, second derivatives of any function.
        """
        return self.evaluate(function, inputs, quantities="hessian", **options).hessian

    def hvp(
        self,
        function: str,
        inputs: Inputs,
        tangents: Inputs,
        **options: Unpack[Options],
    ) -> Any:
        """Evaluates H v [n] of a scalar function.

        `tangents` is v, [n] or [k, n] for k at once; see EvaluateOptions.
        """
        return self.evaluate(
            function, inputs, quantities="hvp", tangents=tangents, **options
        ).hvp

    def newton_step(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Any:
        """Evaluates s [n] with J s = -f(x), by least squares when m != n.

        NaN where a square J is singular.
        """
        return self.evaluate(
            function, inputs, quantities="newton_step", **options
        ).newton_step

    def singular_values(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates the singular values of J, the largest first."""
        return self.evaluate(
            function, inputs, quantities="singular_values", **options
        ).singular_values

    def condition_number(
        self, function: str, inputs: Inputs, **options: Unpack[Options]
    ) -> Array:
        """Evaluates the largest singular value of J over the smallest."""
        return self.evaluate(
            function, inputs, quantities="condition_number", **options
        ).condition_number
