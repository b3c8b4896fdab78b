"""What the right answers are, in numpy; and whether an answer is one."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import jacserve
from jacserve import trees

Forms = Mapping[str, Callable[[np.ndarray], Any]]

V = np.array([0.5, -1.0, 2.0])
U = np.array([1.0, 0.25, -2.0])


class WrongAnswerError(Exception):
    """An answer is not the right one; the text has both."""


def _cycle_jacobian(x: np.ndarray) -> np.ndarray:
    n = x.shape[-1]
    places = np.arange(n)
    jac = np.zeros((*x.shape, n))
    jac[..., places, places] = np.roll(x, -1, axis=-1)
    jac[..., places, (places + 1) % n] += x
    return jac


def _slogdet(x: np.ndarray) -> Any:
    return tuple(np.linalg.slogdet(_cycle_jacobian(x)))


def _singular_values(x: np.ndarray) -> np.ndarray:
    return np.linalg.svd(_cycle_jacobian(x), compute_uv=False)


def _newton_step(x: np.ndarray) -> np.ndarray:
    right = -(x * np.roll(x, -1, axis=-1))[..., None]
    return np.linalg.solve(_cycle_jacobian(x), right)[..., 0]


CYCLE: Forms = {
    "value": lambda x: x * np.roll(x, -1, axis=-1),
    "jacobian": _cycle_jacobian,
    "determinant": lambda x: np.linalg.det(_cycle_jacobian(x)),
    "abs_determinant": lambda x: abs(np.linalg.det(_cycle_jacobian(x))),
    "slogdet": _slogdet,
    "jvp": lambda x: _cycle_jacobian(x) @ V,
    "vjp": lambda x: U @ _cycle_jacobian(x),
    "newton_step": _newton_step,
    "singular_values": _singular_values,
    "condition_number": lambda x: (
        _singular_values(x)[..., 0] / _singular_values(x)[..., -1]
    ),
}
CUBES: Forms = {
    "value": lambda x: np.sum(x**3, axis=-1),
    "gradient": lambda x: 3 * x**2,
    "hessian": lambda x: np.apply_along_axis(np.diag, -1, 6 * x),
    "hvp": lambda x: 6 * x * V,
}
SCALED: Forms = {"value": lambda x: 2 * x + 1}
STENCIL: Forms = {"jacobian": _cycle_jacobian}
BY_FUNCTION: Mapping[str, Forms] = {
    "cycle": CYCLE,
    "cubes": CUBES,
    "scaled": SCALED,
    "stencil": STENCIL,
    "steady": CYCLE,
}


def check(result: jacserve.Result, function: str, x: np.ndarray) -> int:
    """Compares an answer with the right one.

    Args:
        result: The answer.
        function: What was asked of which function.
        x: Where.

    Returns:
        How many arrays were compared.

    Raises:
        WrongAnswerError: It is another.
    """
    if result.function != f"{function}@1":
        raise WrongAnswerError(f"{result.function} answered for {function}")
    forms = BY_FUNCTION[function]
    count = 0
    for name, found in result.quantities.items():
        expected = forms[name](x)
        dense = found.todense() if hasattr(found, "todense") else found
        for (_, one), (_, other) in zip(
            trees.flatten(dense), trees.flatten(expected), strict=True
        ):
            count += 1
            if np.shape(one) != np.shape(other) or not np.allclose(one, other, 1e-7):
                raise WrongAnswerError(
                    f"{name} of {function} at {_shown(x)} is {_shown(one)}, not "
                    f"{_shown(other)}"
                )
    return count


def _shown(array: Any) -> str:
    return np.array2string(np.asarray(array), threshold=20)
