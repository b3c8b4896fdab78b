"""What a client asked, decoded: a `Query`, or a `SparsityQuery`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jacserve.tensors import Array
from jacserve.trees import Path
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
        tangents: Argument names ("" for all of n numbers) and arrays.
        cotangents: Result paths (empty for all of m numbers) and arrays.
        patterns: Hashes of the sparsity patterns that the client has.
        exact: Whether it must not be computed together with other queries.
    """

    function: str
    inputs: tuple[tuple[str, Array], ...]
    quantities: tuple[Quantity, ...]
    wrt: tuple[str, ...] = ()
    mode: ModeOption = "auto"
    layout: Layout = "matrix"
    cast: bool = False
    require_finite: bool = False
    tangents: tuple[tuple[str, Array], ...] = ()
    cotangents: tuple[tuple[Path, Array], ...] = ()
    patterns: tuple[str, ...] = ()
    exact: bool = False

    @property
    def arrays(self) -> list[Array]:
        """All arrays: inputs, tangents and cotangents, in the order given."""
        return [
            *(array for _, array in self.inputs),
            *(array for _, array in self.tangents),
            *(array for _, array in self.cotangents),
        ]


@dataclass(frozen=True, slots=True, eq=False)
class SparsityQuery:
    """What a client asked of a function's sparsity.

    Attributes:
        function: A name, with a version or without.
        sizes: Sizes of symbolic dimensions.
        wrt: Arguments to differentiate with respect to; empty for all.
        kind: Whether it is the pattern of J or of H.
    """

    function: str
    sizes: Mapping[str, int]
    wrt: tuple[str, ...]
    kind: Literal["jacobian", "hessian"]
