"""Tokens and certificates that change while the server has no room for open files."""

import resource
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from guarded import Authority, Tokens, ask, bearer, connected
from server_process import ServerProcess, server_process

LIST = "/jacserve.v1.JacobianService/ListFunctions"
TOO_MANY = "Too many open files"


@contextmanager
def few_files(server: ServerProcess, left: int) -> Generator[None]:
    """Leaves a server room for some files more than it has open."""
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in range(limits[0]) if number not in taken)
    most = [next(free) for _ in range(left + 1)][-1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_token_that_was_revoked_meanwhile_ends(
    functions: Path, tmp_path: Path
) -> None:
    tokens = Tokens(tmp_path)
    token = tokens.make("ada", "read")
    with (
        server_process(functions, "--tokens", tokens.path) as server,
        connected(server.target) as channel,
    ):

        def code() -> grpc.StatusCode:
            return ask(channel, LIST, metadata=bearer(token)).code

        assert code() is grpc.StatusCode.OK
        with few_files(server, 0):
            tokens.revoke("ada")
            wait_for(
                lambda: code() is grpc.StatusCode.OK and TOO_MANY in server.errors()
            )
            time.sleep(1.1)
            assert code() is grpc.StatusCode.OK
        wait_for(lambda: code() is grpc.StatusCode.UNAUTHENTICATED)
        assert server.errors().count(TOO_MANY) == 1


def test_a_certificate_that_was_renewed_meanwhile_is_taken(
    functions: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    certificate, key = old.write("server")

    with ExitStack() as stack:
        server = stack.enter_context(
            server_process(
                functions, "--tls-certificate", certificate, "--tls-key", key
            )
        )

        def answers(authority: Authority) -> bool:
            # Kept open, so that no file is closed while room is left for some.
            credentials = authority.credentials()
            channel = stack.enter_context(connected(server.target, credentials))
            return ask(channel, LIST).code is grpc.StatusCode.OK

        assert answers(old)
        for fresh, path in zip(new.write("server"), (certificate, key), strict=True):
            fresh.replace(path)
        # Room for a connection, and none for a file beside it.
        with few_files(server, 1):
            assert answers(old)
        assert TOO_MANY in server.errors()
        wait_for(lambda: answers(new))
