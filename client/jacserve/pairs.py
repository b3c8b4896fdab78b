"""f and its Jacobian as two functions that share their calls, as solvers want them."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from jacserve import trees
from jacserve.results import Result
from jacserve.tensors import Array


class Pair:
    """Evaluates f and J together, and remembers them for the last x. Thread-safe.

    Solvers ask for f and J at the same x in turn, in either order: the second costs
    nothing.
    """

    def __init__(self, evaluate: Callable[[Any], Result]) -> None:
        """Has evaluated nothing yet.

        Args:
            evaluate: Evaluates value and jacobian at a function's inputs.
        """
        self._evaluate = evaluate
        self._lock = threading.Lock()
        self._last: tuple[list[Array], Result] | None = None

    def fun(self, x: Any, *args: Any) -> Any:
        """Evaluates f: a scalar, or [m]."""
        leaves = _leaves(self._result(x, args))
        if _is_scalar(leaves):
            return leaves[0][()]
        return np.concatenate([leaf.reshape(-1) for leaf in leaves])

    def jac(self, x: Any, *args: Any) -> Any:
        """Evaluates J: [m, n], or the gradient [n] of a scalar function."""
        result = self._result(x, args)
        return result.jacobian[0] if _is_scalar(_leaves(result)) else result.jacobian

    def _result(self, x: Any, args: tuple[Any, ...]) -> Result:
        # Copies: solvers change x in place.
        inputs = [np.array(each) for each in (x, *args)]
        with self._lock:
            last = self._last
        if last is not None and len(last[0]) == len(inputs):
            pairs = zip(last[0], inputs, strict=True)
            if all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs):
                return last[1]
        result = self._evaluate(tuple(inputs))
        with self._lock:
            self._last = inputs, result
        return result


def _leaves(result: Result) -> list[Array]:
    """Returns the arrays that have rows in J: the real and complex ones."""
    leaves = [leaf for _, leaf in trees.flatten(result.value)]
    return [leaf for leaf in leaves if leaf.dtype.kind in "fcV"]


def _is_scalar(leaves: list[Array]) -> bool:
    return [leaf.ndim for leaf in leaves] == [0]
