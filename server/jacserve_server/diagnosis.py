"""Says in words why a program could not be made or run."""

import re
from collections.abc import Sequence

from jacserve.vocabulary import Mode
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.tracing import abstract_results, mode_problem
from jacserve_server.transforms.point import FunctionError
from jacserve_server.work import ProgramKey


def explained(
    function: RegisteredFunction,
    key: ProgramKey,
    wrt: Sequence[tuple[int, str]],
    modes: Sequence[Mode],
    error: BaseException,
) -> ServiceError:
    """Finds out what it was that could not be traced: f, its derivative or a batch.

    Args:
        function: The function.
        key: The program that was to be made.
        wrt: Position and name of the arguments to differentiate.
        modes: How it was to be differentiated.
        error: What tracing the program raised.

    Returns:
        The error to raise: TRACE_FAILED or MODE_UNSUPPORTED.
    """
    computation = key.computation
    try:
        abstract_results(function.call, computation.inputs)
    except FunctionError as failure:
        return trace_error(function, failure)
    for mode in modes:
        if mode == "sparse":
            continue
        problem = mode_problem(function.call, computation.inputs, wrt, mode)
        if problem is None:
            continue
        others = [other for other in function.spec.modes if other != mode]
        return ServiceError(
            "MODE_UNSUPPORTED",
            f"mode is {mode}, but {function.spec.resource} can't be differentiated "
            f"so: {problem}. "
            + (f"Use {others[0]}, or auto." if others else "Ask for value alone."),
            field="mode",
            function=function.spec.resource,
            mode=mode,
            modes=", ".join(function.spec.modes),
        )
    if key.bucket is None:
        return trace_error(function, error)
    return ServiceError(
        "TRACE_FAILED",
        f"{function.spec.resource} works at one point, but not in a batch: "
        f"{_text(error)}. Send single points, or register it with "
        "batchable=False.",
        function=function.spec.resource,
    )


def trace_error(function: RegisteredFunction, error: BaseException) -> ServiceError:
    """Says that a function raised for these inputs; the text is its exception's."""
    return ServiceError(
        "TRACE_FAILED",
        f"{function.spec.resource} can't be traced for these inputs: {_text(error)}. "
        "Pass inputs that it can take, or mend the function.",
        function=function.spec.resource,
        exception=_text(error),
    )


def _text(error: BaseException) -> str:
    if isinstance(error, FunctionError):
        return str(error).rstrip(".")
    return describe_exception(error)


# "Out of memory allocating 80 bytes", and on GPUs "... to allocate 7.5GiB".
_WANTED = re.compile(r"allocat(?:e|ing) ([\d.]+ ?(?:bytes|[KMGT]?i?B\b))")


def execution_error(key: ProgramKey, error: Exception) -> ServiceError:
    """Says that a program failed while it ran, or that the memory did not suffice."""
    resource = f"functions/{key.computation.function}"
    text = describe_exception(error)
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
        wanted = _WANTED.search(str(error))
        return ServiceError(
            "DEVICE_OUT_OF_MEMORY",
            f"{resource} does not fit into the device's memory at {key.bucket or 1} "
            f"points: {text}. Ask for fewer points at once.",
            function=resource,
            points=key.bucket or 1,
            wanted=wanted[1] if wanted else "",
        )
    return ServiceError(
        "EXECUTION_FAILED",
        f"{resource} failed while it ran: {text}. Pass inputs that it can take, or "
        "mend the function.",
        function=resource,
        exception=text,
    )
