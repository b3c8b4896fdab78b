"""Dtypes for linear algebra."""

import jax
import jax.numpy as jnp


def widened(array: jax.Array) -> jax.Array:
    """Returns 16-bit numbers as float32, and others as they are.

    LAPACK has no 16-bit factorisation; float32 holds every such number exactly.
    """
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def real_dtype(array: jax.Array) -> jnp.dtype:
    """Returns the dtype of an array's magnitudes."""
    return jnp.finfo(array.dtype).dtype
