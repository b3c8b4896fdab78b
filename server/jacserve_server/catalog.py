"""The functions that a server serves, by name and version."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jacserve_server.errors import ServiceError
from jacserve_server.registry import Registry, WarmUp
from jacserve_server.signature import FunctionSpec


@dataclass(frozen=True, slots=True, eq=False)
class RegisteredFunction:
    """A function that can be served.

    Attributes:
        spec: All that is known of it.
        call: The function, taking all arguments by position.
        batchable: Whether a batch may be vmapped.
        warm_up: What to compile before a server is ready.
        is_isolated: Whether it is to run in a worker process, wherever others do.
        max_execute_s: Seconds that one execution may take there; None for the
            server's.
    """

    spec: FunctionSpec
    call: Callable[..., Any]
    batchable: bool
    warm_up: tuple[WarmUp, ...] = ()
    is_isolated: bool = False
    max_execute_s: float | None = None


class Catalog:
    """Registered functions by name and version.

    Attributes:
        registries: Where they were declared.
    """

    def __init__(
        self,
        functions: Iterable[RegisteredFunction],
        registries: Iterable[Registry] = (),
    ) -> None:
        """Indexes the functions; a bare name stands for the newest version."""
        self.registries = tuple(registries)
        self._functions: dict[str, RegisteredFunction] = {}
        ordered = sorted(functions, key=lambda f: (f.spec.name, f.spec.version))
        for function in ordered:
            self._functions[function.spec.qualified_name] = function
        self._newest = {function.spec.name: function for function in ordered}

    @property
    def functions(self) -> list[RegisteredFunction]:
        """All functions, ordered by name, then version."""
        return list(self._functions.values())

    @property
    def specs(self) -> list[FunctionSpec]:
        """All functions, ordered by name, then version."""
        return [function.spec for function in self._functions.values()]

    def find(self, name: str) -> RegisteredFunction:
        """Finds a function.

        Args:
            name: "spherical" for the newest version, "spherical@2" for one; the
                prefix "functions/" may stand before it.

        Returns:
            The function.

        Raises:
            ServiceError: There is none.
        """
        name = name.removeprefix("functions/")
        found = self._functions.get(name) or self._newest.get(name)
        if found is None:
            raise self._not_found(name)
        return found

    def _not_found(self, name: str) -> ServiceError:
        bare = name.partition("@")[0]
        if bare in self._newest:
            versions = [s.version for s in self.specs if s.name == bare]
            remedy = f"It has version {', '.join(map(str, versions))}."
        else:
            close = difflib.get_close_matches(bare[:100], self._newest, n=3)
            remedy = (
                f"Did you mean {' or '.join(close)}?"
                if close
                else "List the functions to see their names."
            )
        return ServiceError(
            "FUNCTION_NOT_FOUND",
            f"functions/{name} is not registered. {remedy}",
            field="function",
            function=f"functions/{name}",
        )
