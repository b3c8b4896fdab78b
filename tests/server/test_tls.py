"""Certificates that follow their files, and who may listen to a network."""

import json
import logging
import socket
import ssl
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError
from typer import Typer
from typer.testing import CliRunner

from guarded import Authority, Tokens, ask, connected
from jacserve_server import Config, Registry, serving
from jacserve_server.commands import serve
from jacserve_server.exposure import (
    AddressError,
    ExposureError,
    is_loopback,
    warnings_of,
)
from jacserve_server.tls import CertificateError
from server_process import server_process

registry = Registry()
LIST = "/jacserve.v1.JacobianService/ListFunctions"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings_of(authority: Authority, name: str = "server") -> dict[str, Any]:
    certificate, key = authority.write(name)
    return {"tls_certificate": certificate, "tls_key": key}


def served(target: str, authority: Authority) -> str:
    """The common name of the certificate that a server has now."""
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        found: Any = secure.getpeercert()
        return dict(pair for [pair] in found["subject"])["commonName"]


def test_certificates_are_changed_while_it_runs(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(authority)
    certificate, key = settings["tls_certificate"], settings["tls_key"]
    with serving(registry, **settings) as server:
        assert served(server.target, authority) == "server"
        with connected(server.target, authority.credentials()) as channel:
            assert ask(channel, LIST).code is grpc.StatusCode.OK
            next_certificate, next_key = authority.write("next")
            # Between the two files, and with whatever else is in them.
            next_certificate.replace(certificate)
            assert served(server.target, authority) == "server"
            assert "is not that of the first certificate" in caplog.text
            next_key.replace(key)
            assert served(server.target, authority) == "next"
            key.write_text("nonsense")
            certificate.unlink()
            assert served(server.target, authority) == "next"
            # Whoever is connected stays so.
            assert ask(channel, LIST).code is grpc.StatusCode.OK
        later, later_key = authority.write("later")
        later_key.replace(key)
        later.replace(certificate)
        assert served(server.target, authority) == "later"
    assert "PRIVATE KEY" not in caplog.text.replace("BEGIN PRIVATE KEY in it", "")


def test_a_certificate_that_holds_from_later_on_is_taken_then(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(authority)
    with serving(registry, **settings) as server:
        begins = datetime.now(UTC) + timedelta(seconds=3)
        certificate, key = authority.write("next", begins=begins)
        certificate.replace(settings["tls_certificate"])
        key.replace(settings["tls_key"])
        assert served(server.target, authority) == "server"
        assert served(server.target, authority) == "server"
        while datetime.now(UTC) < begins + timedelta(seconds=1):
            time.sleep(0.1)
        assert served(server.target, authority) == "next"
    assert caplog.text.count("See that this machine's clock is right") == 1


@pytest.mark.slow
def test_a_certificate_that_expires_is_renewed_without_a_restart(
    authority: Authority,
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=4)
    certificate, key = authority.write("server", ends=soon)
    settings = {"tls_certificate": certificate, "tls_key": key}
    with (
        serving(registry, **settings) as server,
        connected(server.target, authority.credentials()) as before,
    ):
        assert ask(before, LIST).code is grpc.StatusCode.OK
        while datetime.now(UTC) < soon + timedelta(seconds=1):
            time.sleep(0.1)
        with connected(server.target, authority.credentials()) as channel:
            assert ask(channel, LIST).code is grpc.StatusCode.UNAVAILABLE
        assert ask(before, LIST).code is grpc.StatusCode.OK
        authority.write("server")
        with connected(server.target, authority.credentials()) as channel:
            assert ask(channel, LIST).code is grpc.StatusCode.OK


def test_authorities_of_clients_are_changed_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    root = tmp_path / "clients.pem"
    root.write_bytes(old.ca_file.read_bytes())
    settings = settings_of(old) | {"tls_client_ca": root}
    alice, _ = new.write("alice")
    credentials = grpc.ssl_channel_credentials(
        old.ca_file.read_bytes(),
        (tmp_path / "new" / "alice.key").read_bytes(),
        alice.read_bytes(),
    )
    with serving(registry, **settings) as server:
        with connected(server.target, credentials) as channel:
            assert ask(channel, LIST).code is grpc.StatusCode.UNAVAILABLE
        root.write_bytes(new.ca_file.read_bytes())
        with connected(server.target, credentials) as channel:
            assert ask(channel, LIST).code is grpc.StatusCode.OK


def test_plaintext_and_strangers_are_no_match_for_tls(authority: Authority) -> None:
    with serving(registry, **settings_of(authority)) as server:
        with connected(server.target) as channel:
            assert ask(channel, LIST).code is grpc.StatusCode.UNAVAILABLE
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            context = ssl.create_default_context(cafile=str(authority.ca_file))
            with pytest.warns(DeprecationWarning, match="TLSv1"):
                context.minimum_version = context.maximum_version = version
            host, _, port = server.target.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=30) as raw:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(raw, server_hostname="localhost")


def _expired(authority: Authority) -> dict[str, Any]:
    ended = datetime.now(UTC) - timedelta(days=1)
    certificate, key = authority.write("old", ends=ended)
    return {"tls_certificate": certificate, "tls_key": key}


def _mixed(authority: Authority) -> dict[str, Any]:
    certificate, _ = authority.write("one")
    _, key = authority.write("two")
    return {"tls_certificate": certificate, "tls_key": key}


def _changed(name: str, text: str | None):
    def change(authority: Authority) -> dict[str, Any]:
        settings = settings_of(authority) | {"tls_client_ca": authority.ca_file}
        if text is None:
            settings[name] = authority.folder / "absent.pem"
        else:
            settings[name].write_text(text)
        return settings

    return change


_FAKE_KEY = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_expired, "expired at"),
        (_mixed, "is not that of the first certificate"),
        (
            _changed("tls_certificate", None),
            "No such file.*Pass a PEM file that is there",
        ),
        (_changed("tls_key", None), "No such file.*Pass a PEM file that is there"),
        (
            _changed("tls_client_ca", None),
            "No such file.*Pass a PEM file that is there",
        ),
        (_changed("tls_certificate", "x"), "has no certificate"),
        (_changed("tls_client_ca", "x"), "has no certificate"),
        (_changed("tls_key", "x"), "has no key that can be read"),
        (_changed("tls_key", _FAKE_KEY), "has no key that can be read"),
    ],
)
def test_files_of_no_use_are_said_at_the_start(
    authority: Authority, make: Any, message: str
) -> None:
    with pytest.raises(CertificateError, match=message) as raised:
        with serving(registry, **make(authority)):
            pass
    assert "c2VjcmV0" not in repr(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"tls_certificate": "a.pem"},
        {"tls_key": "a.key"},
        {"tls_client_ca": "ca.pem"},
        {"tls_client_scopes": ["everything"]},
    ],
)
def test_halves_of_tls_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config.load(**settings)


def test_a_certificate_that_expires_soon_is_warned_of(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    soon = datetime.now(UTC) + timedelta(days=3)
    certificate, key = authority.write("server", ends=soon)
    key.chmod(0o644)
    with serving(registry, tls_certificate=certificate, tls_key=key):
        assert "expires at" in caplog.text
        assert "can be read by everybody" in caplog.text


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("127.1", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("0", False),
        ("", False),
        ("::", False),
        ("[::]", False),
        ("::ffff:0.0.0.0", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("169.254.1.1", False),
        ("8.8.8.8", False),
        ("2130706432", True),
        ("fe80::1", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


TLS = {"tls_certificate": "c", "tls_key": "k"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"insecure": True}, ["INSECURE"]),
        ({"tokens_file": "t"}, ["unencrypted"]),
        (TLS, ["asks nobody who they are"]),
        (TLS | {"tokens_file": "t"}, []),
        (TLS | {"tls_client_ca": "a"}, []),
        (TLS | {"tls_client_ca": "a", "insecure": True}, []),
    ],
)
def test_a_network_is_warned_of(settings: dict[str, Any], words: list[str]) -> None:
    for host in ("0.0.0.0", "::"):
        found = warnings_of(Config.load(host=host, **settings))
        assert len(found) == len(words)
        for text, word in zip(found, words, strict=True):
            assert word in text
    assert not warnings_of(Config.load(host="localhost", **settings))


def test_a_network_is_refused_unless_it_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for host in ("0.0.0.0", "::", "[::]"):
        with pytest.raises(ExposureError, match="--insecure"):
            with serving(registry, host=host):
                pass
    with serving(registry, host="0.0.0.0", insecure=True):
        assert "INSECURE" in caplog.text


@pytest.mark.parametrize("setting", ["host", "metrics_host"])
def test_a_name_without_an_address_is_refused_though_it_gets_one_later(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = socket.getaddrinfo, list[str]()

    def late(host: str, *arguments: Any, **named: Any) -> Any:
        if host != "late":
            return found(host, *arguments, **named)
        asked.append(host)
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found("0.0.0.0", *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    settings: dict[str, Any] = {setting: "late", "metrics_port": 0}
    with pytest.raises(AddressError, match=f"^{setting} late has no address"):
        with serving(registry, **settings):
            pass
    assert asked == ["late"]


def test_metrics_on_a_network_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with serving(registry, metrics_host="0.0.0.0", metrics_port=0):
        assert "may read the metrics" in caplog.text
    assert not warnings_of(Config.load(metrics_host="0.0.0.0"))
    assert not warnings_of(Config.load(metrics_port=0))


def test_the_command_refuses_a_network(functions: Path) -> None:
    with pytest.raises(AssertionError, match="--insecure") as refused:
        with server_process(functions, "--host", "0.0.0.0"):
            pass
    assert "Traceback" not in str(refused.value)


def test_settings_that_are_refused_show_no_secret(
    functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Typer()
    command.command()(serve)
    password = "pa55word"
    url = f"postgresql://jacserve:{password}@localhost/x"
    for file_text, environment in (
        (f'job_database = "{url}"\n', {}),
        (f'jobs_database = ["{url}"]\n', {}),
        (f'jobs_database = "{url}"\ntls_key = "k"\n', {}),
        ("", {"JACSERVE_STORAGE_ROOTS": f'["{url}"]'}),
    ):
        config = tmp_path / "jacserve.toml"
        config.write_text(file_text)
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            arguments = [str(functions), "--config", str(config)]
            done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2
        assert "jacserve: " in done.stderr
        assert password not in done.output


def test_the_command_serves_tls_and_tokens(
    functions: Path, authority: Authority, tmp_path: Path
) -> None:
    tokens = Tokens(tmp_path)
    good = tokens.make("ada", "read")
    settings = settings_of(authority)
    with ExitStack() as stack:
        server = stack.enter_context(
            server_process(
                functions,
                "--tokens",
                tokens.path,
                "--host",
                "0.0.0.0",
                "--tls-certificate",
                settings["tls_certificate"],
                "--tls-key",
                settings["tls_key"],
                GRPC_VERBOSITY="ERROR",
            )
        )
        target = f"localhost:{server.target.rpartition(':')[2]}"
        channel = stack.enter_context(connected(target, authority.credentials()))
        for token in (good, good[:-1], "x"):
            ask(channel, LIST, metadata=(("authorization", f"Bearer {token}"),))
        assert ask(channel, LIST).reason == "TOKEN_INVALID"
        with grpc.insecure_channel(target) as plain:
            assert ask(plain, LIST).code is grpc.StatusCode.UNAVAILABLE
        said = server.errors()
    assert all(map(json.loads, said.splitlines()))
    assert "refused ListFunctions" in said
    assert good[21:-1] not in said
    assert "PRIVATE KEY" not in said


def test_settings_show_no_secret() -> None:
    secret = "pa55word"
    url = f"postgresql://u:{secret}@h/n"
    config = Config.load(
        jobs_database=url, storage_roots={"a": url}, result_roots={"b": url}
    )
    assert secret not in repr(config)
    assert secret not in str(config)
    wrongs: list[dict[str, Any]] = [
        {"job_database": url},
        {"port": secret},
        {"device": url},
    ]
    for wrong in wrongs:
        with pytest.raises(ValidationError) as raised:
            Config.load(**wrong)
        assert secret not in str(raised.value)


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="jacserve_server")
