import hashlib
import json
import logging
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jacserve_server import tokens
from jacserve_server.tokens import TokenFile, TokenFileError
from jacserve_server.tokens_command import tokens as command

TOKEN = re.compile(r"jsv_[0-9a-f]{16}_[A-Za-z0-9_-]{43}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def run(path: Path, *arguments: str, status: int = 0):
    done = CliRunner().invoke(command, [*arguments, "--file", str(path)])
    assert done.exit_code == status, done.output
    return done


def test_a_token_is_printed_once_and_alone(path: Path) -> None:
    done = run(path, "create", "ada", "--scope", "read", "--expires", "90d")
    assert TOKEN.fullmatch(done.stdout.removesuffix("\n"))
    assert "not shown again" in done.stderr
    assert "read; until " in done.stderr
    secret = done.stdout.strip()[21:]
    assert secret not in done.stderr
    assert secret not in path.read_text()
    listed = run(path, "list")
    assert "ada" in listed.stdout
    assert secret not in listed.output
    [token] = tokens.read(path)
    assert token.scopes == {"read"}
    assert token.expires is not None
    assert timedelta(days=89) < token.expires - datetime.now(UTC) <= timedelta(days=90)
    for shown in (repr(token), str(token)):
        assert token.hash not in shown
        assert token.salt not in shown


def test_the_file_is_its_owners_alone_and_has_salted_hashes(path: Path) -> None:
    made = [tokens.create(path, "ada", ["read"], None) for _ in range(3)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entries = json.loads(path.read_text())["tokens"]
    assert len({entry["salt"] for entry in entries}) == 3
    for entry, (token, text) in zip(entries, made, strict=True):
        assert entry["id"] == token.id
        secret = text[21:]
        assert entry["hash"] != hashlib.sha256(secret.encode()).hexdigest()
        assert TokenFile(path).find(text) == token
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "tokens.json", "tokens.json.lock"
    ]  # fmt: skip


def test_revoked_by_id_or_by_name(path: Path) -> None:
    first, _ = tokens.create(path, "ada", ["read"], None)
    second, _ = tokens.create(path, "ada", ["read"], None)
    other, _ = tokens.create(path, "bob", ["read"], None)
    run(path, "revoke", first.id)
    assert tokens.read(path) == [second, other]
    run(path, "revoke", "ada")
    assert tokens.read(path) == [other]
    done = run(path, "revoke", "ada", status=2)
    assert "has no token ada" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "ada", "--scope", "write"),
        ("create", "ada"),
        ("create", "a b", "--scope", "read"),
        ("create", "", "--scope", "read"),
        ("create", "-x", "--scope", "read"),
        ("create", "a" * 64, "--scope", "read"),
        ("create", "0123456789abcdef", "--scope", "read"),
        ("create", "ada\n", "--scope", "read"),
        ("create", "ada", "--scope", "read", "--expires", "soon"),
        ("create", "ada", "--scope", "read", "--expires", "-1d"),
        ("create", "ada", "--scope", "read", "--expires", "5m"),
        ("create", "ada", "--scope", "read", "--expires", "9" * 30 + "w"),
        ("list",),
        ("revoke", "ada"),
    ],
)
def test_what_makes_no_sense_is_said_and_changes_nothing(
    path: Path, arguments: tuple[str, ...]
) -> None:
    done = run(path, *arguments, status=2)
    assert done.stdout == ""
    assert "Traceback" not in done.output
    assert not path.exists()


def test_who_creates_tokens_at_once_loses_none(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(
            pool.map(lambda n: tokens.create(path, f"n{n}", ["read"], None), range(24))
        )
    assert {token.id for token in tokens.read(path)} == {token.id for token, _ in made}


def test_who_could_read_the_file_still_can(path: Path) -> None:
    tokens.create(path, "ada", ["read"], None)
    path.chmod(0o640)
    tokens.create(path, "bob", ["read"], None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    tokens.revoke(path, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_change_is_refused(path: Path, mode: int) -> None:
    tokens.create(path, "ada", ["read"], None)
    path.chmod(mode)
    with pytest.raises(TokenFileError, match="can be changed by others"):
        TokenFile(path)


def test_a_file_that_all_can_read_is_warned_of(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens.create(path, "ada", ["read"], None)
    path.chmod(0o644)
    TokenFile(path)
    assert "can be read by everybody" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"tokens": [{"id": "jsv_secret"}]}',
        '{"version": 2, "tokens": []}',
        '{"tokens": [], "more": 1}',
        "\x00",
        '{"tokens": ' + "[" * 5000,
    ],
)
def test_what_is_no_file_of_tokens_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(TokenFileError, match="can't be read") as raised:
        TokenFile(path)
    assert "secret" not in str(raised.value)


def until(is_so, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_file_that_breaks_keeps_the_last_tokens(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, ada = tokens.create(path, "ada", ["read"], None)
    good = path.read_text()
    file = TokenFile(path, look_s=0.01)
    for breaking in (
        lambda: path.write_text("{"),
        path.unlink,
        lambda: (path.write_text(good), path.chmod(0o666)),
        lambda: (path.chmod(0o600), path.write_text("")),
    ):
        caplog.clear()
        breaking()
        until(
            lambda: file.find(ada) and "the tokens read before it hold" in caplog.text
        )
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            assert file.find(ada) is not None
        # Said once, not at every look; twice where it looked between two changes.
        assert caplog.text.count("the tokens read before it hold") <= 2
    path.write_text(good)
    path.chmod(0o600)
    _, bob = tokens.create(path, "bob", ["compute"], None)
    until(lambda: file.find(bob) is not None)
    tokens.revoke(path, "ada")
    until(lambda: file.find(ada) is None)


def test_an_unchanged_file_is_not_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens.create(path, "ada", ["read"], None)
    file = TokenFile(path, look_s=0.01)
    caplog.set_level(logging.INFO, logger="jacserve_server.tokens")
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        file.current()
    assert caplog.text == ""
    os.utime(path)
    until(lambda: file.current() and "1 tokens" in caplog.text)


def test_a_new_token_counts_at_once(path: Path) -> None:
    tokens.create(path, "ada", ["read"], None)
    file = TokenFile(path, look_s=60)
    bob, text = tokens.create(path, "bob", ["read"], None)
    time.sleep(0.1)
    assert file.find(text) == bob
    # Whoever makes tokens up has the file looked at now and then.
    _, other = tokens.create(path, "eve", ["read"], None)
    assert file.find(other) is None


def test_only_the_whole_secret_is_found(path: Path) -> None:
    _, ada = tokens.create(path, "ada", ["read"], None)
    _, bob = tokens.create(path, "bob", ["read"], None)
    file = TokenFile(path)
    for _ in range(2):  # Before and after it was verified.
        assert file.find(ada[:21] + bob[21:]) is None
        assert file.find(bob[:21] + ada[21:]) is None
        for wrong in ("", ada[:-1], f"{ada} ", f"{ada}\n", ada.upper(), f"\u0661{ada}"):
            assert file.find(wrong) is None
        found = file.find(ada)
        assert found is not None
        assert found.identity == "token:ada"


def test_a_secret_that_was_verified_is_not_for_the_next_token_of_its_id(
    path: Path,
) -> None:
    _, ada = tokens.create(path, "ada", ["read"], None)
    file = TokenFile(path, look_s=0.01)
    assert file.find(ada) is not None
    entries = json.loads(path.read_text())
    entries["tokens"][0]["hash"] = "0" * 64
    path.write_text(json.dumps(entries))
    until(lambda: file.find(ada) is None)
