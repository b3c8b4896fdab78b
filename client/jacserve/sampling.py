"""Random points, for trying functions out."""

import numpy as np

from jacserve.tensors import Array, dtype_named


def random_array(
    random: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str,
    *,
    is_positive: bool = False,
) -> Array:
    """Draws an array of numbers of moderate size.

    Of several axes, the numbers are smaller the longer the last one is, so that a
    matrix times a vector is of moderate size, too, and saturates no function.

    Args:
        random: The generator.
        shape: The shape.
        dtype: The dtype's name. Whole numbers are 0 or 1, which index whatever has
            two elements.
        is_positive: Draws from 0.1 to 2, where logarithms and roots exist, instead
            of around 0.

    Returns:
        The array.
    """
    target = dtype_named(dtype)
    if target.kind in "iub":
        return random.integers(0, 2, shape).astype(target)
    spread = 1 / np.sqrt(max(shape[-1], 1)) if len(shape) > 1 else 1.0
    numbers = (
        random.uniform(0.1, 2.0, shape) if is_positive else random.normal(size=shape)
    )
    if target.kind == "c":
        numbers = numbers + 1j * random.normal(size=shape)
    return np.asarray(spread * numbers).astype(target)
