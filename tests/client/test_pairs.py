"""f and J as two functions that share their calls."""

from collections.abc import Iterator

import numpy as np
import pytest
import scipy.optimize

import jacserve
from jacserve_server import RunningServer


class Counting(jacserve.Client):
    calls = 0

    def evaluate(self, *args, **options):
        self.calls += 1
        return super().evaluate(*args, **options)


@pytest.fixture
def counting(server: RunningServer) -> Iterator[Counting]:
    with Counting(server.target) as client:
        yield client


def test_one_call_serves_both_at_the_same_point(counting: Counting) -> None:
    fun, jac = counting.fun_and_jac("spherical")
    x = np.array([2.0, 0.5, 1.0])
    assert fun(x).shape == (3,)
    J = jac(x)
    assert counting.calls == 1
    x[0] = 3.0  # In place, as solvers do.
    np.testing.assert_allclose(jac(x)[:, 1:], 1.5 * J[:, 1:], rtol=1e-14)
    assert fun(x)[2] == pytest.approx(3.0 * np.cos(0.5))
    assert counting.calls == 2
    jac(x.astype("f4"))
    assert counting.calls == 3


def test_minimize_takes_one_call_a_point(counting: Counting) -> None:
    fun, jac = counting.fun_and_jac("rosenbrock")
    found = scipy.optimize.minimize(fun, np.array([-1.2, 1.0]), jac=jac)
    np.testing.assert_allclose(found.x, [1.0, 1.0], atol=1e-5)
    assert found.njev > 10
    assert counting.calls <= found.nfev


def test_a_session_finds_a_root(client: jacserve.Client) -> None:
    with client.session() as session:
        fun, jac = session.fun_and_jac("linear_solve", wrt="b")
        A = np.diag([2.0, 4.0])
        found = scipy.optimize.root(
            lambda b: fun(A, b) - 1.0, np.zeros(2), jac=lambda b: jac(A, b)
        )
    np.testing.assert_allclose(found.x, [2.0, 4.0])


def test_results_of_several_arrays_are_one_vector(client: jacserve.Client) -> None:
    fun, jac = client.fun_and_jac("special")
    x = np.array([1.5, 2.5, 3.5])
    assert fun(x).shape == (6,)
    assert jac(x).shape == (6, 3)


def test_errors_pass_and_are_not_remembered(client: jacserve.Client) -> None:
    fun, jac = client.fun_and_jac("spherical")
    with pytest.raises(ValueError, match="takes \\[3\\]"):
        fun(np.ones(4))
    assert jac(np.ones(3)).shape == (3, 3)
