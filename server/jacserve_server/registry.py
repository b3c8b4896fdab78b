"""Collects the functions that a file declares.

`Registry` keeps what was declared and where; nothing is traced here, so a file that
registers functions also runs without a server, and at the speed of its own imports.
`catalog.py` checks and traces the declarations when a server is about to start.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

from jacserve.vocabulary import MODE_OPTIONS, QUANTITIES, ModeOption, Quantity

F = TypeVar("F", bound=Callable[..., Any])

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


class RegistrationError(Exception):
    """Functions can't be served; the message says which, where, why and the remedy.

    Attributes:
        problems: One text for each.
    """

    def __init__(self, *problems: str) -> None:
        """Joins the problems into one message."""
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Calls that a function is made ready for before a server says that it is.

    ```python
    @registry.function(warm_up=[WarmUp({"n": 784}, batch=64, shared=("weights",))])
    ```

    Attributes:
        sizes: Sizes of its symbolic dimensions; one that works where left out.
        batch: The most points of a call; smaller batches are made ready afterwards.
            None for single points alone.
        shared: Arguments that all points of a batch share.
        quantities: What will be asked for.
        wrt: Arguments to differentiate with respect to; empty for all.
        mode: How to differentiate.
        dtype: The dtype of the inputs that accept it; None for the widest.
    """

    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    batch: int | None = None
    shared: Sequence[str] = ()
    quantities: Sequence[Quantity] = ("value", "jacobian")
    wrt: Sequence[str] = ()
    mode: ModeOption = "auto"
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Declaration:
    """One function as it was declared.

    Attributes:
        function: The plain Python function.
        name: The name to serve it under.
        version: The version to serve it under.
        mode: The mode that "auto" stands for.
        max_batch: The most points of one query, or None.
        batchable: Whether a batch may be vmapped; otherwise its rows run one after
            another, each at its own cost.
        sizes: Sizes to trace its symbolic dimensions at, at registration.
        warm_up: What to compile before a server is ready.
        isolation: "process" to run it in a worker process; None for where the server
            has functions run.
        max_execute_s: Seconds that one execution may take there; None for the
            server's.
    """

    function: Callable[..., Any]
    name: str
    version: int = 1
    mode: ModeOption = "auto"
    max_batch: int | None = None
    batchable: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    warm_up: Sequence[WarmUp] = ()
    isolation: Literal["process"] | None = None
    max_execute_s: float | None = None

    @property
    def qualified_name(self) -> str:
        """Name and version, "spherical@1"."""
        return f"{self.name}@{self.version}"

    @property
    def origin(self) -> str:
        """Where the function was written, "functions.py:12"."""
        code = getattr(underlying(self.function), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else "<unknown>"


def underlying(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the Python function behind partials, wrappers and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) else type(function).__call__


class Registry:
    """The functions that a file offers to a server.

    ```python
    registry = Registry()


    @registry.function
    def spherical(x: Float[Array, "3"]) -> Float[Array, "3"]: ...
    ```
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._declarations: dict[str, Declaration] = {}

    @property
    def declarations(self) -> tuple[Declaration, ...]:
        """Everything declared, in order."""
        return tuple(self._declarations.values())

    @overload
    def function(self, function: F, /) -> F: ...

    @overload
    def function(
        self,
        function: None = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        mode: ModeOption = "auto",
        max_batch: int | None = None,
        batchable: bool = True,
        sizes: Mapping[str, int] | None = None,
        warm_up: Sequence[WarmUp] = (),
        isolation: Literal["process"] | None = None,
        max_execute_s: float | None = None,
    ) -> Callable[[F], F]: ...

    def function(
        self,
        function: F | None = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        mode: ModeOption = "auto",
        max_batch: int | None = None,
        batchable: bool = True,
        sizes: Mapping[str, int] | None = None,
        warm_up: Sequence[WarmUp] = (),
        isolation: Literal["process"] | None = None,
        max_execute_s: float | None = None,
    ) -> F | Callable[[F], F]:
        """Registers a function; use it as a decorator, bare or with options.

        Args:
            function: The function. Every parameter is annotated with a jaxtyping
                array, such as `Float[Array, "n 3"]`; it returns arrays, or tuples
                and dictionaries of arrays.
            name: The name to serve it under; its own by default.
            version: The version to serve it under. A bare name means the newest.
            mode: What "auto" stands for; by default the shapes of each query
                decide.
            max_batch: The most points of one query.
            batchable: False runs the rows of a batch one after another instead of
                vmapping them: for functions whose loops or branches differ much
                in cost between points.
            sizes: Sizes of the symbolic dimensions for the trace at registration,
                such as `{"n": 784}`, where small ones would not do.
            warm_up: Calls to compile for before a server says that it is ready.
            isolation: "process" runs it in a worker process, which is killed when it
                does not end.
            max_execute_s: Seconds that one execution may take there; the server's
                by default.

        Returns:
            The function itself, unchanged.

        Raises:
            RegistrationError: The name and version are taken, or an option has no
                valid value.
        """

        def declare(function: F) -> F:
            self._declare(
                Declaration(
                    function=function,
                    name=name or getattr(function, "__name__", ""),
                    version=version,
                    mode=mode,
                    max_batch=max_batch,
                    batchable=batchable,
                    sizes={} if sizes is None else sizes,
                    warm_up=tuple(warm_up),
                    isolation=isolation,
                    max_execute_s=max_execute_s,
                )
            )
            return function

        return declare if function is None else declare(function)

    def _declare(self, declaration: Declaration) -> None:
        problem = _find_problem(declaration)
        if earlier := self._declarations.get(declaration.qualified_name):
            problem = duplicate_problem(earlier)
        if problem:
            raise RegistrationError(describe_problem(declaration, problem))
        self._declarations[declaration.qualified_name] = declaration


def describe_problem(declaration: Declaration, problem: str) -> str:
    """Returns a problem as a server reports it: file, function, what, remedy."""
    return f"{declaration.origin}: functions/{declaration.name}: {problem}"


def duplicate_problem(earlier: Declaration) -> str:
    """Says that another function has the name and version."""
    return (
        f"{earlier.qualified_name} is already registered, at {earlier.origin}. Pass "
        f"another name=, or version={earlier.version + 1}."
    )


def _find_problem(declaration: Declaration) -> str | None:
    name, version, most = declaration.name, declaration.version, declaration.max_batch
    sizes = declaration.sizes
    if not callable(declaration.function):
        return (
            f"{declaration.function!r} is not a function. Use @registry.function, or "
            "@registry.function(name=...)."
        )
    if not name:
        return "it has no name of its own. Pass name=."
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return (
            f"{name!r} is not a valid name. Pass name= with letters, digits, '_', '-' "
            "and '.', a letter first."
        )
    if type(version) is not int or not 1 <= version < 2**31:
        return f"version is {version!r}. Pass a whole number from 1."
    if declaration.mode not in (*MODE_OPTIONS,):
        return f"mode is {declaration.mode!r}. Pass one of {', '.join(MODE_OPTIONS)}."
    if most is not None and (type(most) is not int or most < 1):
        return f"max_batch is {most!r}. Pass a whole number from 1, or None."
    if type(declaration.batchable) is not bool:
        return f"batchable is {declaration.batchable!r}. Pass True or False."
    if not isinstance(sizes, Mapping) or not all(
        isinstance(symbol, str) and type(size) is int and size >= 0
        for symbol, size in sizes.items()
    ):
        return f'sizes is {sizes!r}. Pass whole numbers by name, such as {{"n": 784}}.'
    if declaration.isolation not in (None, "process"):
        return f"isolation is {declaration.isolation!r}. Pass process, or None."
    budget_s = declaration.max_execute_s
    if budget_s is not None and not (type(budget_s) in (int, float) and budget_s > 0):
        return f"max_execute_s is {budget_s!r}. Pass a number of seconds, or None."
    if not all(isinstance(each, WarmUp) for each in declaration.warm_up):
        return f"warm_up is {declaration.warm_up!r}. Pass a list of WarmUp(...)."
    for each in declaration.warm_up:
        unknown = [q for q in each.quantities if q not in QUANTITIES]
        if unknown or each.mode not in (*MODE_OPTIONS,):
            return (
                f"{each} has the quantity or mode {', '.join(unknown) or each.mode}, "
                "which does not exist. Check the spelling."
            )
    return None
