"""The zoo: functions of many kinds, with what is known of their Jacobians.

`jacobian` is the closed form at one point, of shape [m, n] with all arguments'
columns side by side; None where there is none. `growth` is how many times more than
by its own rounding a result may err: a chaotic system multiplies every error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from jax.scipy.special import erf, gammaln
from jaxtyping import Array, Complex, Float, Int

from jacserve_server import Registry

registry = Registry()
ZOO: list["Animal"] = []

Inputs = tuple[np.ndarray, ...]
LINEAR_TALL = np.random.default_rng(1).normal(size=(4, 3))
LINEAR_WIDE = np.random.default_rng(2).normal(size=(2, 5))
COMPLEX_MATRIX = np.random.default_rng(3).normal(size=(3, 2, 2)) @ [1.0, 1.0j]


@dataclass(frozen=True)
class Animal:
    function: Callable[..., Any]
    sample: Callable[[np.random.Generator], Inputs]
    jacobian: Callable[..., np.ndarray] | None = None
    modes: tuple[str, ...] = ("forward", "reverse")
    dtypes: tuple[str, ...] = ("float32", "float64")
    growth: float = 1.0

    @property
    def name(self) -> str:
        return self.function.__name__


def vector(n: int, low: float = -1.5, high: float = 1.5):
    return lambda random: (random.uniform(low, high, size=n),)


def animal(sample, jacobian=None, **facts):
    def add(function):
        registry.function(function)
        ZOO.append(Animal(function, sample, jacobian, **facts))
        return function

    return add


@animal(vector(4), lambda x: np.diag(np.exp(x) * (np.sin(x) + np.cos(x))))
def elementwise(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sin(x) * jnp.exp(x)


@animal(vector(3), lambda x: LINEAR_TALL)
def linear_tall(x: Float[Array, "3"]) -> Float[Array, "4"]:
    return jnp.asarray(LINEAR_TALL, x.dtype) @ x


@animal(vector(5), lambda x: LINEAR_WIDE)
def linear_wide(x: Float[Array, "5"]) -> Float[Array, "2"]:
    return jnp.asarray(LINEAR_WIDE, x.dtype) @ x


@animal(
    lambda random: (random.normal(size=(2, 3)), random.normal(size=3)),
    lambda A, x: np.hstack([np.kron(np.eye(2), x), A]),
)
def bilinear(A: Float[Array, "m n"], x: Float[Array, "n"]) -> Float[Array, "m"]:
    return A @ x


def rosenbrock_gradient(x):
    g = np.zeros_like(x)
    g[:-1] = -400 * x[:-1] * (x[1:] - x[:-1] ** 2) - 2 * (1 - x[:-1])
    g[1:] += 200 * (x[1:] - x[:-1] ** 2)
    return g[None]


@animal(vector(4), rosenbrock_gradient)
def rosenbrock(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


@animal(
    vector(3, -5.0, 5.0), lambda x: (2 * x + 20 * np.pi * np.sin(2 * np.pi * x))[None]
)
def rastrigin(x: Float[Array, "n"]) -> Float[Array, ""]:
    return 10.0 * x.size + jnp.sum(x**2 - 10.0 * jnp.cos(2.0 * jnp.pi * x))


def spherical_jacobian(x):
    r, p, a = x
    sp, cp, sa, ca = np.sin(p), np.cos(p), np.sin(a), np.cos(a)
    return np.array(
        [
            [sp * ca, r * cp * ca, -r * sp * sa],
            [sp * sa, r * cp * sa, r * sp * ca],
            [cp, -r * sp, 0.0],
        ]
    )


@animal(vector(3, 0.5, 2.5), spherical_jacobian)
def spherical(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Spherical (r, polar, azimuth) to Cartesian coordinates."""
    r, p, a = x
    return jnp.stack(
        [r * jnp.sin(p) * jnp.cos(a), r * jnp.sin(p) * jnp.sin(a), r * jnp.cos(p)]
    )


@animal(
    vector(2, 0.5, 2.5),
    lambda x: np.array(
        [[np.cos(x[1]), -x[0] * np.sin(x[1])], [np.sin(x[1]), x[0] * np.cos(x[1])]]
    ),
)
def polar(x: Float[Array, "2"]) -> Float[Array, "2"]:
    return x[0] * jnp.stack([jnp.cos(x[1]), jnp.sin(x[1])])


def softmax_jacobian(x):
    p = np.exp(x - x.max())
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


@animal(vector(5, -3.0, 3.0), softmax_jacobian)
def softmax(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.nn.softmax(x)


def classifier_jacobian(pixels, weights):
    inner = softmax_jacobian(weights @ np.append(pixels, 1.0))
    by_weights = np.einsum("ij,k->ijk", inner, np.append(pixels, 1.0))
    return np.hstack([inner @ weights[:, :-1], by_weights.reshape(len(weights), -1)])


@animal(
    lambda random: (random.uniform(size=12), random.normal(scale=0.3, size=(3, 13))),
    classifier_jacobian,
)
def classifier(
    pixels: Float[Array, "12"], weights: Float[Array, "3 13"]
) -> Float[Array, "3"]:
    return jax.nn.softmax(weights[:, :-1] @ pixels + weights[:, -1])


def planar_arm_jacobian(q):
    angles = np.cumsum(q)
    columns = [
        [-np.sin(angles[j:]).sum(), np.cos(angles[j:]).sum(), 1.0]
        for j in range(len(q))
    ]
    return np.array(columns).T


@animal(vector(3), planar_arm_jacobian)
def planar_arm(q: Float[Array, "3"]) -> Float[Array, "3"]:
    """Position and heading of a planar arm with three links of length 1."""
    angles = jnp.cumsum(q)
    return jnp.stack([jnp.cos(angles).sum(), jnp.sin(angles).sum(), angles[-1]])


@animal(vector(6), growth=4.0)
def robot_arm(q: Float[Array, "6"]) -> dict[str, Float[Array, "..."]]:
    """Pose of a six-axis arm, by Denavit-Hartenberg parameters."""
    d = (0.4, 0.0, 0.1, 0.4, 0.0, 0.1)
    a = (0.0, 0.4, 0.0, 0.0, 0.0, 0.0)
    alpha = (np.pi / 2, 0.0, np.pi / 2, -np.pi / 2, np.pi / 2, 0.0)
    pose = jnp.eye(4, dtype=q.dtype)
    for joint in range(6):
        c, s = jnp.cos(q[joint]), jnp.sin(q[joint])
        ca, sa = float(np.cos(alpha[joint])), float(np.sin(alpha[joint]))
        step = jnp.array(
            [
                [c, -s * ca, s * sa, a[joint] * c],
                [s, c * ca, -c * sa, a[joint] * s],
                [0.0, sa, ca, d[joint]],
                [0.0, 0.0, 0.0, 1.0],
            ]
        ).astype(q.dtype)
        pose = pose @ step
    return {"position": pose[:3, 3], "orientation": pose[:3, :3]}


def lorenz_field(x, y, z):
    return 10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 * z / 3.0


def lorenz_jacobian(x):
    """By central differences of 60 digits, which are exact here."""

    def march(state):
        h = mpmath.mpf(0.01)
        for _ in range(100):
            k1 = field(state)
            k2 = field([s + h / 2 * k for s, k in zip(state, k1, strict=True)])
            k3 = field([s + h / 2 * k for s, k in zip(state, k2, strict=True)])
            k4 = field([s + h * k for s, k in zip(state, k3, strict=True)])
            slopes = zip(k1, k2, k3, k4, strict=True)
            state = [
                s + h / 6 * (a + 2 * b + 2 * c + d)
                for s, (a, b, c, d) in zip(state, slopes, strict=True)
            ]
        return state

    def field(state):
        u, v, w = state
        return [10 * (v - u), u * (28 - w) - v, u * v - 8 * w / mpmath.mpf(3)]

    jac = np.zeros((3, 3))
    with mpmath.workdps(60):
        h = mpmath.mpf(10) ** -20
        for j in range(3):
            up, down = ([mpmath.mpf(float(c)) for c in x] for _ in range(2))
            up[j] += h
            down[j] -= h
            pairs = zip(march(up), march(down), strict=True)
            jac[:, j] = [float((u - d) / (2 * h)) for u, d in pairs]
    return jac


@animal(vector(3, 1.0, 5.0), lorenz_jacobian, growth=1e3)
def lorenz(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """The Lorenz system after 100 Runge-Kutta steps."""

    def step(s, _):
        h = 0.01
        k1 = jnp.stack(lorenz_field(*s))
        k2 = jnp.stack(lorenz_field(*(s + h / 2 * k1)))
        k3 = jnp.stack(lorenz_field(*(s + h / 2 * k2)))
        k4 = jnp.stack(lorenz_field(*(s + h * k3)))
        return s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return jax.lax.scan(step, x, None, length=100)[0]


def burgers_jacobian(u):
    n, nu = len(u), 0.1
    jac = np.diag(np.full(n, 2 * nu))
    for i in range(n):
        right, left = (i + 1) % n, (i - 1) % n
        jac[i, i] += (u[right] - u[left]) / 2
        jac[i, right] += u[i] / 2 - nu
        jac[i, left] += -u[i] / 2 - nu
    return jac


@animal(vector(8), burgers_jacobian)
def burgers(u: Float[Array, "n"]) -> Float[Array, "n"]:
    """The periodic Burgers residual u u_x - nu u_xx on a unit grid."""
    right, left = jnp.roll(u, -1), jnp.roll(u, 1)
    return u * (right - left) / 2 - 0.1 * (right - 2 * u + left)


@animal(
    vector(3),
    lambda x: np.diag(np.cos(x)) if x[0] > 0 else np.diag(2 * x),
)
def branch(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jax.lax.cond(x[0] > 0, jnp.sin, jnp.square, x)


@animal(vector(3, 0.5, 4.0), lambda x: np.diag(0.5 / np.sqrt(x)), modes=("forward",))
def heron_root(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Square roots by Heron's iteration: a loop whose length depends on x."""

    def improve(state):
        y, count = state
        return (y + x / y) / 2, count + 1

    def is_rough(state):
        y, count = state
        return (jnp.max(jnp.abs(y * y - x)) > 1e-3) & (count < 50)

    y, _ = jax.lax.while_loop(is_rough, improve, (x, 0))
    for _ in range(3):
        y = (y + x / y) / 2
    return y


@jax.custom_vjp
def clipped_exp(x):
    return jnp.exp(x)


clipped_exp.defvjp(
    lambda x: (jnp.exp(x), jnp.exp(x)), lambda residual, g: (residual * g,)
)


@animal(vector(3), lambda x: np.diag(np.exp(x)), modes=("reverse",))
def with_custom_vjp(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return clipped_exp(x)


@jax.custom_jvp
def stable_log1pexp(x):
    return jnp.log1p(jnp.exp(x))


@stable_log1pexp.defjvp
def _stable_log1pexp_jvp(primals, tangents):
    (x,), (v,) = primals, tangents
    return stable_log1pexp(x), v * (1 - 1 / (1 + jnp.exp(x)))


@animal(vector(4), lambda x: np.diag(1 / (1 + np.exp(-x))))
def with_custom_jvp(x: Float[Array, "4"]) -> Float[Array, "4"]:
    return stable_log1pexp(x)


@animal(vector(5), lambda x: np.eye(5)[np.argsort(x)])
def sort(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sort(x)


@animal(
    lambda random: (random.normal(size=(3, 3)) + 4 * np.eye(3),),
    lambda A: -np.kron(np.linalg.inv(A), np.linalg.inv(A).T),
    growth=4.0,
)
def inverse(A: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
    return jnp.linalg.inv(A)


def solve_jacobian(A, b):
    x, inverted = np.linalg.solve(A, b), np.linalg.inv(A)
    return np.hstack([-np.kron(inverted, x), inverted])


@animal(
    lambda random: (
        random.normal(size=(3, 3)) + 4 * np.eye(3),
        random.normal(size=3),
    ),
    solve_jacobian,
    growth=4.0,
)
def linear_solve(A: Float[Array, "n n"], b: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.linalg.solve(A, b)


def complex_vector(n: int):
    return lambda random: (random.normal(size=(n, 2)) @ [1.0, 1.0j],)


@animal(complex_vector(3), lambda z: np.diag(2 * z), dtypes=("complex64", "complex128"))
def complex_square(z: Complex[Array, "3"]) -> Complex[Array, "3"]:
    return z**2


@animal(
    complex_vector(2),
    lambda z: np.exp(COMPLEX_MATRIX @ z)[:, None] * COMPLEX_MATRIX,
    dtypes=("complex64", "complex128"),
    growth=4.0,
)
def complex_wave(z: Complex[Array, "2"]) -> Complex[Array, "3"]:
    return jnp.exp(jnp.asarray(COMPLEX_MATRIX, z.dtype) @ z)


@animal(vector(4), lambda x: np.fft.rfft(np.eye(4)).T, modes=("forward",))
def spectrum(x: Float[Array, "4"]) -> Complex[Array, "3"]:
    """Real in, complex out: only forward mode exists."""
    return jnp.fft.rfft(x)


@animal(vector(4), lambda x: (np.exp(x - x.max()) / np.exp(x - x.max()).sum())[None])
def logsumexp(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(x)


@animal(
    lambda random: (random.uniform(0.5, 2.0),),
    lambda t: np.array([[-np.sin(t)], [np.cos(t)], [1.0]]),
)
def helix(t: Float[Array, ""]) -> Float[Array, "3"]:
    return jnp.stack([jnp.cos(t), jnp.sin(t), t])


@animal(lambda random: (random.uniform(0.5, 2.0),), lambda x: np.array([[3.0 * x**2]]))
def cube(x: Float[Array, ""]) -> Float[Array, ""]:
    return x**3


@animal(
    lambda random: (random.normal(size=4), random.integers(0, 4, size=2)),
    lambda x, i: np.eye(4)[i],
)
def gather(x: Float[Array, "4"], i: Int[Array, "2"]) -> Float[Array, "2"]:
    return x[i]


def kepler_jacobian(x):
    mean, e = x
    with mpmath.workdps(30):
        root = mpmath.findroot(lambda E: E - e * mpmath.sin(E) - mean, mpmath.mpf(mean))
        E = float(mpmath.re(root))
    slope = 1 / (1 - e * np.cos(E))
    return np.array([[slope, np.sin(E) * slope]])


@animal(
    lambda random: (np.array([random.uniform(0.5, 2.5), random.uniform(0.1, 0.6)]),),
    kepler_jacobian,
    growth=4.0,
)
def kepler(x: Float[Array, "2"]) -> Float[Array, ""]:
    """Eccentric anomaly by Newton's method, from mean anomaly and eccentricity."""
    mean, e = x

    def improve(_, E):
        return E - (E - e * jnp.sin(E) - mean) / (1 - e * jnp.cos(E))

    return jax.lax.fori_loop(0, 12, improve, mean)


@animal(
    lambda random: (random.normal(size=3), random.normal(size=3)),
    lambda q, v: np.vstack(
        [
            np.hstack([np.zeros(3), v]),
            np.hstack([np.diag(np.cos(q)), np.zeros((3, 3))]),
            np.hstack([2 * q, np.zeros(3)]),
        ]
    ),
)
def pendulum(q: Float[Array, "3"], v: Float[Array, "3"]) -> dict[str, Any]:
    """Nested results, written in an order that is not the alphabet's."""
    potential = (jnp.sin(q), jnp.sum(q**2))
    return {"kinetic": jnp.sum(v**2) / 2, "forces": potential}


def special_jacobian(x):
    slope = 2 / np.sqrt(np.pi) * np.exp(-(x**2))
    return np.vstack([np.diag(slope), np.diag([mp_digamma(v) for v in x])])


def mp_digamma(x: float) -> float:
    with mpmath.workdps(30):
        return float(mpmath.re(mpmath.digamma(x)))


@animal(vector(2, 0.5, 4.0), special_jacobian, growth=4.0)
def special(x: Float[Array, "n"]) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    return erf(x), gammaln(x)


@animal(vector(4), lambda x: np.diag((x > 0).astype(float)))
def relu(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.nn.relu(x)


@animal(
    lambda random: (random.normal(size=(2, 3)),),
    lambda X: (
        np.einsum("ik,jl->ijkl", np.eye(2), X) + np.einsum("jk,il->ijkl", np.eye(2), X)
    ).reshape(4, 6),
)
def gram(X: Float[Array, "p q"]) -> Float[Array, "p p"]:
    return X @ X.T


@animal(
    lambda random: (random.normal(size=3), random.normal(size=3)),
    lambda a, b: np.hstack(
        [
            np.array([[0, b[2], -b[1]], [-b[2], 0, b[0]], [b[1], -b[0], 0]]),
            np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]]),
        ]
    ),
)
def cross(a: Float[Array, "3"], b: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.cross(a, b)
