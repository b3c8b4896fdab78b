"""What is compiled before a server says that it is ready."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from jacserve.dimensions import DimensionError
from jacserve.sampling import random_array
from jacserve.tensors import Array
from jacserve_server.batches import bucket_for
from jacserve_server.planning import plan
from jacserve_server.query import Query
from jacserve_server.registry import WarmUp
from jacserve_server.signature import FunctionSpec
from jacserve_server.work import Work


def first_work(function: FunctionSpec, warm_up: WarmUp) -> Work:
    """Returns the work that a warm-up names: its largest batch, at random points.

    Args:
        function: The function.
        warm_up: What to warm up.

    Returns:
        The work; to do it is to compile its program.

    Raises:
        ServiceError: It does not fit the function.
        DimensionError: Its sizes do not.
    """
    return _work(function, warm_up, bucket_for(warm_up.batch))


def further_work(function: FunctionSpec, warm_up: WarmUp) -> Iterator[Work]:
    """Yields the same for smaller batches, the larger first, and for one point."""
    for bucket in _smaller(bucket_for(warm_up.batch)):
        yield _work(function, warm_up, bucket)


def single_point(function: FunctionSpec, warm_up: WarmUp) -> Work:
    """Returns the same for one point."""
    return _work(function, warm_up, None)


def _smaller(bucket: int | None) -> Iterable[int | None]:
    if bucket is None:
        return ()
    powers = itertools.takewhile(lambda power: power < bucket, map(_power, range(64)))
    return [*reversed(list(powers)), None]


def _power(exponent: int) -> int:
    return 1 << exponent


def _work(function: FunctionSpec, warm_up: WarmUp, bucket: int | None) -> Work:
    arguments = function.signature.arguments
    if unknown := set(warm_up.sizes) - set(function.signature.symbols):
        raise DimensionError(f"it has no dimension {', '.join(sorted(unknown))}")
    if unknown := set(warm_up.shared) - {argument.name for argument in arguments}:
        raise DimensionError(f"it has no argument {', '.join(sorted(unknown))}")
    shapes = function.signature.shapes({**function.sizes, **warm_up.sizes})
    random = np.random.default_rng(0)
    inputs: list[tuple[str, Array]] = []
    for argument, shape in zip(arguments, shapes, strict=True):
        dtype = warm_up.dtype if warm_up.dtype in argument.dtypes else None
        rows = () if bucket is None or argument.name in warm_up.shared else (bucket,)
        array = random_array(
            random, (*rows, *shape), dtype or argument.dtypes[0], is_positive=True
        )
        inputs.append((argument.name, array))
    query = Query(
        function.qualified_name,
        tuple(inputs),
        tuple(warm_up.quantities),
        wrt=tuple(warm_up.wrt),
        mode=warm_up.mode,
    )
    return plan(query, function)
