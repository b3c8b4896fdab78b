from pathlib import Path

import pytest
from pydantic import ValidationError

from jacserve_server import Config


def test_defaults_are_safe() -> None:
    config = Config.load()
    assert config.host == "127.0.0.1"
    assert config.max_payload_bytes == 2**30


def test_arguments_go_before_environment_before_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "jacserve.toml"
    file.write_text("port = 1\nmax_queries = 1\ngrace_s = 1.5\n")
    monkeypatch.setenv("JACSERVE_PORT", "2")
    monkeypatch.setenv("JACSERVE_MAX_QUERIES", "2")
    config = Config.load(file, port=3, host=None)
    assert (config.port, config.max_queries, config.grace_s) == (3, 2, 1.5)
    assert config.host == "127.0.0.1"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Config.load().port = 7  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "jacserve.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ValidationError, match="prot"):
        Config.load(file)
