"""Every status code and every reason has its exception."""

import builtins
from pathlib import Path

import grpc
import pytest

import jacserve
from jacserve import errors
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server.errors import CODES, ServiceError, describe_exception
from jacserve_server.statuses import status_of

ROOT = Path(__file__).parents[2]


def test_every_status_code_maps() -> None:
    codes = {code.name for code in grpc.StatusCode} - {"OK"}
    assert set(errors.BY_CODE) == codes


def test_every_reason_has_a_code_and_so_an_exception() -> None:
    reasons = set(pb.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
    assert set(CODES) == reasons
    assert set(errors.BY_REASON) <= reasons


def test_the_contract_states_the_code_of_each_reason() -> None:
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    text = (ROOT / "proto/jacserve/v1/jacobian.proto").read_text()
    for reason, code in CODES.items():
        before = text.partition(f"  {reason} = ")[0]
        comment = before[before.rindex(";") :]
        assert f"// {names[code]}:" in comment, reason


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (jacserve.InvalidRequestError, ValueError),
        (jacserve.NotFoundError, LookupError),
        (jacserve.NonFiniteError, ArithmeticError),
        (jacserve.AccessError, PermissionError),
        (jacserve.UnavailableError, ConnectionError),
        (jacserve.DeadlineError, TimeoutError),
    ],
)
def test_the_tree_joins_the_builtin_one(kind, base) -> None:
    assert issubclass(kind, base)
    assert issubclass(kind, jacserve.JacobianError)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("TOKEN_INVALID", jacserve.AccessError),
        ("SCOPE_MISSING", jacserve.AccessError),
        ("SOURCE_FORBIDDEN", jacserve.InvalidRequestError),
        ("TOO_MANY_STREAMS", jacserve.OverloadedError),
        ("COMPILE_BUDGET_SPENT", jacserve.OverloadedError),
        ("STREAM_IDLE", jacserve.UnavailableError),
        ("TIME_BUDGET_SPENT", jacserve.DeadlineError),
        ("WORKER_DIED", jacserve.ServerError),
        ("WORKER_UNAVAILABLE", jacserve.UnavailableError),
        ("FUNCTION_QUARANTINED", jacserve.PreconditionError),
    ],
)
def test_what_a_reason_becomes(reason, kind) -> None:
    error = ServiceError(reason, "no", retry_after_s=2.5)
    found = errors.from_status(status_of(error, "3f2a"), "localhost:1")
    assert type(found) is kind
    assert (str(found), found.request_id) == ("no", "3f2a")
    assert found.__notes__ == ["(request 3f2a)"]
    if isinstance(found, jacserve.OverloadedError):
        assert found.retry_after_s == 2.5


def test_the_docstring_draws_the_whole_tree() -> None:
    drawn = {
        word
        for word in (errors.__doc__ or "").replace("(", " ").split()
        if word.endswith("Error") and not hasattr(builtins, word)
    }
    exported = {name for name in jacserve.__all__ if name.endswith("Error")}
    assert drawn == exported


def test_no_server_is_a_connection_error_that_says_what_to_do() -> None:
    with (
        jacserve.Client("127.0.0.1:1") as client,
        pytest.raises(
            ConnectionError, match=r"No server answers at 127.0.0.1:1.*jacserve serve"
        ),
    ):
        client.functions()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ValueError"),
        ("x is 3/4 of y", "ValueError: x is 3/4 of y"),
        ("in /home/me/lib/a.py:3", "ValueError: in a.py:3"),
        ('File "/home/me/a.py", line 3', 'ValueError: File "a.py", line 3'),
        (r"C:\Users\me\a.py", "ValueError: a.py"),
        ("in file:///home/me/a.py", "ValueError: in file:a.py"),
        (
            "see https://docs.jax.dev/en/a.html",
            "ValueError: see https://docs.jax.dev/en/a.html",
        ),
        ("y" * 5000, "ValueError: " + "y" * 335 + " ... " + "y" * 347),
        (
            "INTERNAL: CpuCallback error calling callback: Traceback (most recent "
            'call last):\n  File "/a/b.py", line 3\nOSError: at /a/b\nand more',
            "OSError: at b\nand more",
        ),
    ],
)
def test_an_exception_is_described_without_directories(
    text: str, expected: str
) -> None:
    assert describe_exception(ValueError(text)) == expected
