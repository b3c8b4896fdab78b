"""What a client asked, decoded: a `Query`."""

from dataclasses import dataclass

from jacserve.tensors import Array
from jacserve.vocabulary import Layout, ModeOption, Quantity


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What a client asked of one function.

    Attributes:
        function: A name, with a version or without.
        inputs: Argument names ("" for the next in order) and arrays.
        quantities: What to compute, in the order asked, without repeats.
        wrt: Arguments to differentiate with respect to; empty for all.
        mode: How to differentiate.
        layout: How derivatives are laid out.
        cast: Whether inputs may be converted to a dtype that is accepted.
        require_finite: Whether NaN and Inf are errors.
    """

    function: str
    inputs: tuple[tuple[str, Array], ...]
    quantities: tuple[Quantity, ...]
    wrt: tuple[str, ...] = ()
    mode: ModeOption = "auto"
    layout: Layout = "matrix"
    cast: bool = False
    require_finite: bool = False
