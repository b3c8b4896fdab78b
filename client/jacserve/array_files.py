"""Arrays as the command line reads and writes them: JSON text, .npy and .npz."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jacserve import tensors, trees
from jacserve.functions import FunctionInfo
from jacserve.mapped_files import map_npy, map_npz
from jacserve.results import Result
from jacserve.sparse import SparseMatrix
from jacserve.tensors import Array
from jacserve.vocabulary import DTYPES

_PLACED = re.compile(r"([\w.]+)=(.*)", re.DOTALL)
_NAMED = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)


class ArrayTextError(ValueError):
    """An input or output can't be read or written; the text says why."""


def read_inputs(
    texts: Sequence[str],
    function: FunctionInfo,
    dtype: str | None,
    *,
    mapped: bool = False,
) -> tuple[Array, ...] | dict[str, Array]:
    """Reads the inputs of a call.

    Args:
        texts: "ARRAY" for the next argument in declared order, "NAME=ARRAY" for one
            by name, or an .npz file of arrays by name. An ARRAY is JSON text or an
            .npy file.
        function: The function, which gives JSON numbers their dtype.
        dtype: The dtype of JSON numbers; None for the widest that is accepted.
        mapped: Maps files into memory instead of reading them.

    Returns:
        The arrays, in order or by name.

    Raises:
        ArrayTextError: An input can't be read, or is given twice.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArrayTextError(
            f"there is no dtype {dtype}. Take one of {', '.join(DTYPES)}."
        )
    accepted = [(argument.name, argument.dtypes) for argument in function.arguments]
    named: list[tuple[str, Array]] = []
    in_order: list[Array] = []
    for place, text in enumerate(texts):
        if Path(text).suffix == ".npz":
            named.extend(_load(text, mapped=mapped).items())
            continue
        match = _NAMED.fullmatch(text)
        at = dict(accepted).get(match[1]) if match else None
        dtypes = at or accepted[min(place, len(accepted) - 1)][1]
        array = _read_array(
            match[2] if match else text, (dtype,) if dtype else dtypes, mapped=mapped
        )
        if match:
            named.append((match[1], array))
        else:
            in_order.append(array)
    if named and in_order:
        raise ArrayTextError("Give all inputs by name, or none.")
    by_name = dict(named)
    if len(by_name) < len(named):
        raise ArrayTextError("An input is given twice. Give each once.")
    return by_name or tuple(in_order)


def read_cotangents(
    texts: Sequence[str], function: FunctionInfo, dtype: str | None
) -> Any:
    """Reads the cotangents of a call.

    Args:
        texts: "ARRAY", or "PATH=ARRAY" for each array of the result, where PATH is
            made of its keys and indices, joined by dots.
        function: The function, whose arguments give JSON numbers their dtype.
        dtype: The dtype of JSON numbers; None for the widest that is accepted.

    Returns:
        One array, or a tree of them.

    Raises:
        ArrayTextError: A cotangent can't be read, or they form no tree.
    """
    of_numbers = [a.dtypes for a in function.arguments if a.differentiable]
    dtypes = (dtype,) if dtype else (of_numbers or [("float64",)])[0]
    leaves: list[tuple[trees.Path, Array]] = []
    for text in texts:
        match = _PLACED.fullmatch(text)
        steps = match[1].split(".") if match else []
        path = tuple(int(step) if step.isdecimal() else step for step in steps)
        leaves.append((path, _read_array(match[2] if match else text, dtypes)))
    try:
        return trees.unflatten(leaves)
    except ValueError as error:
        raise ArrayTextError(
            f"The cotangents don't fit together: {error}. Give one array, or one for "
            "each path of the result."
        ) from error


def _read_array(text: str, dtypes: Sequence[str], *, mapped: bool = False) -> Array:
    if Path(text).suffix == ".npy":
        return _load(text, mapped=mapped)
    try:
        array = _from_json(text)
        target = tensors.cast_target(array.dtype.name, dtypes)
        if target is None:
            raise ValueError(f"it has {array.dtype} numbers")
        return tensors.converted(array, target)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ArrayTextError(
            f"{text!r} is neither JSON text of a {' or '.join(dtypes)} array nor the "
            f"name of an .npy or .npz file ({error}). Write, for example, '[1.0, 2.0]'."
        ) from error


def _from_json(text: str) -> Array:
    """Reads JSON numbers; strings are what JSON lacks: "NaN", "Infinity", "1+2j"."""
    array = np.asarray(json.loads(text))
    if array.dtype.kind == "U":
        try:
            return array.astype(float)
        except ValueError:
            return array.astype(complex)
    if array.dtype.kind == "O":  # Beyond int64; or null, which numpy would make NaN.
        return np.array([float(x) for x in array.ravel()]).reshape(array.shape)
    return array


def _load(path: str, *, mapped: bool = False) -> Any:
    try:
        if path.endswith(".npz"):
            arrays = map_npz(Path(path)) if mapped else dict(np.load(path))
        else:
            arrays = {"": map_npy(Path(path)) if mapped else np.load(path)}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ArrayTextError(f"{path} can't be read: {error}") from error
    for array in arrays.values():
        if array.dtype.name not in DTYPES:
            raise ArrayTextError(
                f"{path} has dtype {array.dtype}, which can't be sent. Save it as one "
                f"of {', '.join(DTYPES)}."
            )
    return arrays if path.endswith(".npz") else arrays[""]


def flat(result: Result) -> Iterator[tuple[str, Array]]:
    """Yields every array of an answer with a label such as "value['z'][0]".

    A sparse matrix is four: its data, rows, columns and shape.
    """
    for quantity, tree in result.quantities.items():
        for path, array in trees.flatten(tree):
            label = quantity + trees.format_path(path)
            if isinstance(array, SparseMatrix):
                yield f"{label}.data", array.data
                yield f"{label}.rows", array.pattern.rows
                yield f"{label}.columns", array.pattern.columns
                yield f"{label}.shape", np.array(array.shape)
            else:
                yield label, array


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
    # Numpy's formats forget what it is, and it would come back as bytes.
    if any(array.dtype.name == "bfloat16" for array in arrays.values()):
        raise ArrayTextError(f"{path} can't hold bfloat16. Write json.")
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
        "modes": dict(result.modes),
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
        case SparseMatrix():
            return {
                "shape": list(tree.shape),
                "rows": tree.pattern.rows.tolist(),
                "columns": tree.pattern.columns.tolist(),
                "data": _jsonable(tree.data),
            }
        case np.ndarray():
            return _jsonable(tree.tolist())
        case complex():
            return str(tree).strip("()")
        case float() if not np.isfinite(tree):
            return {"inf": "Infinity", "-inf": "-Infinity"}.get(str(tree), "NaN")
        case _:
            return tree
