"""What everything that evaluates in a blocking way has in common: its shorthands."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Unpack

from jacserve.pairs import Pair
from jacserve.queries import EvaluateOptions, Inputs, Options
from jacserve.results import Result
from jacserve.tensors import Array
from jacserve.vocabulary import Quantity


class Evaluator(ABC):
    """Has a method for each common set of quantities; see `Client`."""

    @abstractmethod
    def evaluate(
        self,
        function: str,
        inputs: Inputs,
        *,
        quantities: Quantity | Sequence[Quantity] = ("value", "jacobian"),
        **options: Unpack[EvaluateOptions],
    ) -> Result:
        """Evaluates any set of quantities; see `Client.evaluate`."""

    def fun_and_jac(
        self, function: str, **options: Unpack[Options]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Makes f and its Jacobian two functions, for SciPy and solvers like it.

        Both are evaluated in one call, and remembered for the last x: a solver that
        asks for both at the same x, in either order, costs one round trip.

        ```python
        fun, jac = session.fun_and_jac("rosenbrock")
        scipy.optimize.minimize(fun, x0, jac=jac)
        ```

        Args:
            function: A registered name. Its first argument is x; more arguments of
                the two functions (SciPy's args) are its others, and then wrt has to
                name the first.
            **options: As for `evaluate`.

        Returns:
            fun(x), a scalar or [m]; and jac(x), [m, n], or the gradient [n] of a
            scalar function. Both raise what `evaluate` raises.
        """

        def evaluate(inputs: tuple[Any, ...]) -> Result:
            return self.evaluate(
                function, inputs, quantities=("value", "jacobian"), **options
            )

        pair = Pair(evaluate)
        return pair.fun, pair.jac

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
