"""Finds registries in files, modules and installed entry points."""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from jacserve_server.registry import RegistrationError, Registry

ENTRY_POINT_GROUP = "jacserve.functions"


def load_registries(targets: Iterable[str]) -> list[Registry]:
    """Imports everything named and returns the registries found.

    Args:
        targets: Python files, importable modules, or "module:attribute". None at
            all means every installed entry point of the group "jacserve.functions".

    Returns:
        The registries, each once.

    Raises:
        RegistrationError: Something can't be imported or registers nothing; the
            error names every such target.
    """
    registries: dict[int, Registry] = {}
    problems: list[str] = []
    for found in _sources(list(targets)):
        try:
            registries.update((id(each), each) for each in found.load())
        except RegistrationError as error:
            problems.extend(error.problems)
    if problems:
        raise RegistrationError(*problems)
    return list(registries.values())


class _Source:
    """One thing to import."""

    def __init__(self, target: str | EntryPoint) -> None:
        self.target = target

    def load(self) -> list[Registry]:
        found = self._imported()
        if isinstance(found, Registry):
            registries = [found]
        else:
            registries = [
                value for value in vars(found).values() if isinstance(value, Registry)
            ]
        if not any(registry.declarations for registry in registries):
            raise RegistrationError(
                f"{self._label}: it registers no functions. Create a "
                "jacserve_server.Registry() in it and decorate functions with "
                "@registry.function."
            )
        return registries

    @property
    def _label(self) -> str:
        if isinstance(self.target, EntryPoint):
            return f"entry point {self.target.name} = {self.target.value}"
        return self.target

    def _imported(self) -> ModuleType | Registry:
        try:
            found = (
                self.target.load()
                if isinstance(self.target, EntryPoint)
                else _import(self.target)
            )
        except RegistrationError:
            raise
        except _TargetError as error:
            raise RegistrationError(f"{self._label}: {error}") from error
        except KeyboardInterrupt:
            raise
        # A file may raise anything, SystemExit included.
        except BaseException as error:
            raise RegistrationError(
                f"{self._label}: importing it failed{_place(error)}: "
                f"{type(error).__name__}: {error}. Run it with python to see more."
            ) from error
        if not isinstance(found, ModuleType | Registry):
            raise RegistrationError(
                f"{self._label}: it is a {type(found).__name__}. Name a module or a "
                "jacserve_server.Registry."
            )
        return found


class _TargetError(Exception):
    """A target is not what it should be."""


def _sources(targets: list[str]) -> Iterator[_Source]:
    yield from map(_Source, targets)
    if targets:
        return
    installed = entry_points(group=ENTRY_POINT_GROUP)
    if not installed:
        raise RegistrationError(
            "nothing to serve: no file or module was named, and no installed package "
            f'has entry points in the group "{ENTRY_POINT_GROUP}". Name a file, as in '
            "`jacserve serve functions.py`."
        )
    yield from map(_Source, installed)


def _import(target: str) -> ModuleType | Registry:
    path = Path(target)
    if path.suffix == ".py" or path.is_file():
        return _import_file(path)
    if path.is_dir():
        raise _TargetError("it is a directory. Name the files in it that you mean.")
    name, _, attribute = target.partition(":")
    if name.endswith(".py"):
        raise _TargetError(f"all of a file is served. Leave out :{attribute}.")
    # As `python -m MODULE` does, so that a module of this folder is found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        is_known = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        # Importing a parent package may fail for want of something else.
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        is_known = False
    except ValueError:
        is_known = name in sys.modules
    if not is_known:
        raise _TargetError(
            "there is no such file or module. Check the spelling, and that it is "
            "installed or on PYTHONPATH."
        )
    module = importlib.import_module(name)
    if not attribute:
        return module
    if not hasattr(module, attribute):
        raise _TargetError(
            f"module {name} has no attribute {attribute}. Check the spelling."
        )
    return getattr(module, attribute)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise _TargetError("there is no such file. Check the path.")
    path = path.resolve()
    # As `python FILE` does, so that the file may import its neighbours.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # Under its path, because two files of the same name are two modules.
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _TargetError("it is not a Python file. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(error: BaseException) -> str:
    """Says at which line of the user's code an import failed."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f" at line {error.lineno}"
    libraries = (*sysconfig.get_paths().values(), "<", __file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries):
            return f" at {frame.filename}:{frame.lineno}"
    return ""
