"""Files, modules and entry points, and what is said of those that fail."""

import sys
import textwrap
from pathlib import Path

import pytest

from jacserve_server import RegistrationError
from jacserve_server.loading import load_registries

GOOD = """
    from jaxtyping import Array, Float
    from jacserve_server import Registry
    registry = Registry()
    @registry.function
    def {name}(x: Float[Array, ""]) -> Float[Array, ""]:
        return x
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


def names(*targets: object) -> list[str]:
    registries = load_registries(map(str, targets))
    return [d.name for registry in registries for d in registry.declarations]


def test_files_modules_and_attributes(write) -> None:
    file = write("some_file.py", GOOD.format(name="f"))
    write("some_package/__init__.py", "")
    write("some_package/inner.py", GOOD.format(name="g"))
    assert names(file) == ["f"]
    assert names("some_package.inner") == ["g"]
    assert names("some_package.inner:registry") == ["g"]
    assert names(file, "some_package.inner") == ["f", "g"]


def test_a_file_named_twice_is_loaded_once(write) -> None:
    file = write("twice.py", GOOD.format(name="f"))
    assert names(file, file) == ["f"]


def test_two_files_of_one_name_are_two_modules(write) -> None:
    one = write("one/functions.py", GOOD.format(name="f"))
    two = write("two/functions.py", GOOD.format(name="g"))
    assert names(one, two) == ["f", "g"]


def test_a_file_may_import_its_neighbours_and_share_their_registry(write) -> None:
    write("beside/neighbour.py", GOOD.format(name="f"))
    file = write(
        "beside/main.py",
        """
        from jaxtyping import Array, Float
        from neighbour import registry
        @registry.function
        def g(x: Float[Array, ""]) -> Float[Array, ""]:
            return x
        """,
    )
    assert names(file) == ["f", "g"]


def test_a_module_of_the_current_folder_is_found(
    write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("folder/here.py", GOOD.format(name="f"))
    monkeypatch.chdir(file.parent)
    assert names("here") == ["f"]


def test_a_package_that_lacks_something_is_not_called_missing(write) -> None:
    write("lacking/__init__.py", "import no_such_module_at_all")
    write("lacking/inner.py", GOOD.format(name="f"))
    with pytest.raises(RegistrationError, match=r"named 'no_such_module_at_all'"):
        names("lacking.inner")


def test_installed_entry_points_are_served_when_nothing_is_named(write) -> None:
    write("plugin.py", GOOD.format(name="from_plugin"))
    write(
        "plugin-1.0.dist-info/entry_points.txt",
        "[jacserve.functions]\nours = plugin:registry\n",
    )
    write("plugin-1.0.dist-info/METADATA", "Name: plugin\nVersion: 1.0\n")
    assert names() == ["from_plugin"]


def test_nothing_to_serve_is_an_error() -> None:
    with pytest.raises(RegistrationError, match=r"nothing to serve.*Name a file"):
        load_registries([])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module_at_all", r"bad\.py:1: ModuleNotFoundError: .*no_such"),
        ("x = 1\n\ny = 1 / 0\n", r"bad\.py:3: ZeroDivisionError"),
        ("def f(:\n", r"at line 1: SyntaxError"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("class Odd(BaseException): pass\nraise Odd", r"bad\.py:2: Odd"),
        ("x = 1", "registers no functions.*@registry.function"),
        (
            "from jacserve_server import Registry\nregistry = Registry()\n",
            "registers no functions",
        ),
        (
            textwrap.dedent(GOOD.format(name="f")) + "registry.function(f)\n",
            r"bad\.py:5: functions/f: f@1 is already registered",
        ),
    ],
)
def test_a_file_that_fails_says_where_and_why(write, text: str, words: str) -> None:
    file = write("bad.py", text)
    good = write("good.py", GOOD.format(name="f"))
    with pytest.raises(RegistrationError, match=words) as caught:
        load_registries([str(good), str(file)])
    assert str(file) in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere/nothing.py", "no such file"),
        ("no_such_module_at_all", "no such file or module"),
        ("no.such.module", "no such file or module"),
        ("json:nothing", "no attribute nothing"),
        ("json:dumps", "it is a function"),
        ("tests", "it is a directory"),
        ("functions.py:registry", "all of a file is served"),
    ],
)
def test_a_target_that_is_not_there(target: str, words: str) -> None:
    with pytest.raises(RegistrationError, match=words):
        load_registries([target])
