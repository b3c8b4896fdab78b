"""Arrays as the command line reads and writes them: JSON text, .npy and .npz."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jacserve import trees
from jacserve.functions import FunctionInfo
from jacserve.results import Result
from jacserve.tensors import Array, dtype_named

_NAMED = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)


class ArrayTextError(ValueError):
    """An input or output can't be read or written; the text says why."""


def read_inputs(
    texts: Sequence[str], function: FunctionInfo, dtype: str | None
) -> tuple[Array, ...] | dict[str, Array]:
    """Reads the inputs of a call.

    Args:
        texts: "ARRAY" for the next argument in declared order, "NAME=ARRAY" for one
            by name, or an .npz file of arrays by name. An ARRAY is JSON text or an
            .npy file.
        function: The function, which gives JSON numbers their dtype.
        dtype: The dtype of JSON numbers; None for the widest that is accepted.

    Returns:
        The arrays, in order or by name.

    Raises:
        ArrayTextError: An input can't be read.
    """
    by_name: dict[str, Array] = {}
    in_order: list[Array] = []
    accepted = {argument.name: argument.dtypes for argument in function.arguments}
    for place, text in enumerate(texts):
        if Path(text).suffix == ".npz":
            by_name.update(_load(text))
            continue
        match = _NAMED.fullmatch(text)
        name = match[1] if match else list(accepted)[min(place, len(accepted) - 1)]
        wanted = dtype or accepted.get(name, ("float64",))[0]
        array = _read_array(match[2] if match else text, wanted)
        if match:
            by_name[name] = array
        else:
            in_order.append(array)
    if by_name and in_order:
        raise ArrayTextError("Give all inputs by name, or none.")
    return by_name or tuple(in_order)


def _read_array(text: str, dtype: str) -> Array:
    if Path(text).suffix == ".npy":
        return _load(text)
    try:
        array = np.asarray(json.loads(text))
        if array.dtype.kind == "U":  # Complex numbers, as "1+2j".
            array = array.astype(complex)
        return array.astype(dtype_named(dtype))
    except (ValueError, TypeError) as error:
        raise ArrayTextError(
            f"{text!r} is neither JSON text of a {dtype} array nor the name of an "
            f".npy or .npz file ({error}). Write, for example, '[1.0, 2.0]'."
        ) from error


def _load(path: str) -> Any:
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        return dict(loaded) if path.endswith(".npz") else loaded
    except (OSError, ValueError, EOFError) as error:
        raise ArrayTextError(f"{path} can't be read: {error}") from error


def flat(result: Result) -> Iterator[tuple[str, Array]]:
    """Yields every array of an answer with a label such as "value['z'][0]"."""
    for quantity, tree in result.quantities.items():
        for path, array in trees.flatten(tree):
            yield quantity + trees.format_path(path), array


def write_result(result: Result, path: Path) -> None:
    """Writes an answer to an .npy file (one array) or .npz file (any number).

    Args:
        result: The answer.
        path: The file.

    Raises:
        ArrayTextError: The file can't be written, or holds one array only.
    """
    arrays = dict(flat(result))
    if path.suffix == ".npy" and len(arrays) > 1:
        raise ArrayTextError(
            f"{path} holds one array, but the answer has {len(arrays)}: "
            f"{', '.join(arrays)}. Write to an .npz file."
        )
    if path.suffix not in {".npy", ".npz"}:
        raise ArrayTextError(f"{path} is neither .npy nor .npz. Name it so.")
    try:
        if path.suffix == ".npy":
            np.save(path, next(iter(arrays.values())), allow_pickle=False)
        else:
            np.savez(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise ArrayTextError(f"{path} can't be written: {error}") from error


def to_json(result: Result) -> str:
    """Returns an answer as JSON text.

    Complex numbers, NaN and infinities have no JSON form; they become strings that
    `read_inputs` reads again.
    """
    answer = {
        "function": result.function,
        "mode": result.mode,
        "finite": result.finite,
        "device": result.device,
        "timing": {
            "queue_s": result.timing.queue_s,
            "compile_s": result.timing.compile_s,
            "execute_s": result.timing.execute_s,
        },
        "quantities": {
            name: _jsonable(tree) for name, tree in result.quantities.items()
        },
    }
    return json.dumps(answer, indent=2, allow_nan=False)


def _jsonable(tree: Any) -> Any:
    match tree:
        case Mapping():
            return {key: _jsonable(child) for key, child in tree.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        case tuple() | list():
            return [_jsonable(child) for child in tree]  # pyright: ignore[reportUnknownVariableType]
        case np.ndarray():
            return _jsonable(tree.tolist())
        case complex():
            return str(tree).strip("()")
        case float() if not np.isfinite(tree):
            return {"inf": "Infinity", "-inf": "-Infinity"}.get(str(tree), "NaN")
        case _:
            return tree
