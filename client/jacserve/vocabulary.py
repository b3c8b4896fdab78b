"""The contract's enumerations as plain words, for both sides of the wire.

Python says "forward", the wire says MODE_FORWARD. The words are derived from the
enumerations' own names, so the two cannot drift apart; the literal types repeat
them for type checkers.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2

Quantity = Literal[
    "value",
    "jacobian",
    "gradient",
    "determinant",
    "abs_determinant",
    "slogdet",
    "jvp",
    "vjp",
    "hessian",
    "hvp",
    "newton_step",
    "singular_values",
    "condition_number",
]
Direction = Literal["forward", "reverse"]
Curvature = Literal[
    "forward_over_reverse", "reverse_over_reverse", "forward_over_forward"
]
Mode = Direction | Literal["sparse"] | Curvature
ModeOption = Literal["auto", "forward", "reverse", "sparse"]
Layout = Literal["matrix", "blocks", "csr", "coo"]
Isolation = Literal["none", "process"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


def _words(enum: EnumTypeWrapper, prefix: str) -> Mapping[str, Any]:
    words = {name.removeprefix(prefix).lower(): value for name, value in enum.items()}
    del words["unspecified"]
    return MappingProxyType(words)


QUANTITIES: Mapping[str, pb.Quantity] = _words(pb.Quantity, "QUANTITY_")
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
MODES: Mapping[str, pb.Mode] = _words(pb.Mode, "MODE_")
MODE_OPTIONS: Mapping[str, pb.Mode] = MappingProxyType(
    {option: MODES[option] for option in get_args(ModeOption)}
)
LAYOUTS: Mapping[str, pb.Layout] = _words(pb.Layout, "LAYOUT_")
DTYPES: Mapping[str, pb.DType] = _words(pb.DType, "DTYPE_")
ISOLATIONS: Mapping[str, pb.Isolation] = _words(pb.Isolation, "ISOLATION_")
JOB_STATES: Mapping[str, jobs_pb2.JobState] = _words(jobs_pb2.JobState, "JOB_STATE_")


_TABLES: tuple[Mapping[str, int], ...] = (
    QUANTITIES, MODES, MODE_OPTIONS, LAYOUTS, DTYPES, ISOLATIONS, JOB_STATES
)  # fmt: skip
_BY_NUMBER: Mapping[int, Mapping[int, str]] = {
    id(table): {number: text for text, number in table.items()} for table in _TABLES
}


def word(words: Mapping[str, int], number: int) -> str:
    """Returns the word for a number of the wire.

    Args:
        words: One of this module's tables.
        number: The number, as received.

    Returns:
        The word.

    Raises:
        KeyError: The number is unspecified or unknown.
    """
    return _BY_NUMBER[id(words)][number]
