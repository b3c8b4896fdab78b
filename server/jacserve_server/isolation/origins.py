"""Where registries come from, so that a worker process finds the same functions."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from jacserve_server.catalog import Catalog
from jacserve_server.isolation.protocol import Origin
from jacserve_server.loading import load_registries
from jacserve_server.registry import (
    Declaration,
    RegistrationError,
    Registry,
    describe_problem,
)

_REMEDY = (
    "A worker process imports functions by themselves: keep their registry in a "
    "variable of a file or a module, or leave isolation out."
)


def origins_of(registries: Iterable[Registry]) -> tuple[Origin, ...]:
    """Finds out where registries can be imported from.

    Args:
        registries: The registries.

    Returns:
        An origin for each.

    Raises:
        RegistrationError: Some can't be.
    """
    return tuple(map(_origin, registries))


def load(origins: Iterable[Origin]) -> list[Registry]:
    """Imports registries again.

    Args:
        origins: Where they are.

    Returns:
        The registries.

    Raises:
        RegistrationError: Some are not there any more.
    """
    found: list[Registry] = []
    for origin in origins:
        load_registries(origin.modules)
        first = origin.modules[0]
        registry = getattr(sys.modules.get(first), origin.attribute, None)
        if not isinstance(registry, Registry):
            raise RegistrationError(
                f"{first}: {origin.attribute} is not the registry that it was. "
                f"{_REMEDY}"
            )
        found.append(registry)
    return found


def digests(catalog: Catalog) -> dict[str, str]:
    """Returns what each function is: what is known of it, and the file that has it.

    Args:
        catalog: The functions.

    Returns:
        A hash for each, by its qualified name.
    """
    return {
        declaration.qualified_name: _digest(catalog, declaration)
        for registry in catalog.registries
        for declaration in registry.declarations
    }


def check_agreement(
    ours: dict[str, str], theirs: dict[str, str], catalog: Catalog
) -> None:
    """Refuses a worker that has other functions.

    Args:
        ours: What the server's functions are.
        theirs: What the worker's are.
        catalog: The server's functions.

    Raises:
        RegistrationError: They differ; the error names each that does.
    """
    problems: list[str] = []
    for declaration in (d for each in catalog.registries for d in each.declarations):
        name = declaration.qualified_name
        if name not in theirs:
            problem = f"a worker process does not find it. {_REMEDY}"
        elif theirs[name] != ours[name]:
            problem = (
                "its file is not what it was when the server started. Restart the "
                "server."
            )
        else:
            continue
        problems.append(describe_problem(declaration, problem))
    if problems:
        raise RegistrationError(*problems)


def _digest(catalog: Catalog, declaration: Declaration) -> str:
    function = catalog.find(declaration.qualified_name)
    spec = function.spec
    # Why it lacks a mode may have addresses of this process in it.
    known = (spec.signature, spec.results, spec.modes, spec.preferred_mode)
    options = (dict(spec.sizes), spec.max_batch, function.batchable)
    digest = hashlib.sha256(repr((known, options)).encode())
    digest.update(_contents(declaration.origin.rpartition(":")[0]))
    return digest.hexdigest()


@cache
def _contents(path: str) -> bytes:
    # Once, so that it is what was imported, more or less.
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _origin(registry: Registry) -> Origin:
    held = list(_holders(registry))
    if not held:
        where = registry.declarations[0] if registry.declarations else None
        problem = f"its registry is in no module. {_REMEDY}"
        raise RegistrationError(describe_problem(where, problem) if where else problem)
    return Origin(tuple(dict.fromkeys(name for name, _ in held)), held[0][1])


def _holders(registry: Registry) -> Iterator[tuple[str, str]]:
    """Yields modules that have a registry, and its name in them."""
    for name, module in list(sys.modules.items()):
        attributes = getattr(module, "__dict__", {})
        found = next((a for a, v in list(attributes.items()) if v is registry), None)
        if found is not None and (target := _target(name, module)) is not None:
            yield target, found


def _target(name: str, module: ModuleType) -> str | None:
    """Returns the name by which another process imports a module."""
    spec = module.__spec__
    if name == "__main__" and spec is not None:
        name = spec.name
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    if name != "__main__" and _is_importable(name, file):
        return name
    return str(Path(file).resolve()) if file.endswith(".py") else None


def _is_importable(name: str, file: str) -> bool:
    parent = name.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if parent and path is None:
        return False
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:
            continue
        if spec is not None:
            return spec.origin is not None and Path(spec.origin) == Path(file)
    return False
