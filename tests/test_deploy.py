"""What installs a server agrees with the server's settings."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jacserve_server.config import Config
from jacserve_server.exposure import warnings_of
from jacserve_server.loading import load_registries
from jacserve_server.registration import build_catalog

DEPLOY = Path(__file__).parents[1] / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
SYSTEMD = DEPLOY / "systemd"

FILES = sorted(DEPLOY.rglob("jacserve.toml"))


def found(pattern: str, path: Path) -> str:
    [text] = re.findall(pattern, path.read_text(), re.M)
    return text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_settings_are_valid_and_let_in_no_stranger(file: Path) -> None:
    config = Config.load(file)
    assert config.tokens_file is not None
    assert not config.insecure
    assert not any("may call everything" in each for each in warnings_of(config))


@pytest.mark.parametrize(
    ("file", "seconds"),
    [
        (
            SYSTEMD / "jacserve.toml",
            lambda: found(r"^TimeoutStopSec=(\d+)$", SYSTEMD / "jacserve.service"),
        ),
        (
            BASE / "jacserve.toml",
            lambda: found(
                r"terminationGracePeriodSeconds: (\d+)$", BASE / "deployment.yaml"
            ),
        ),
    ],
    ids=["systemd", "kubernetes"],
)
def test_a_server_may_finish_before_it_is_killed(
    file: Path, seconds: Callable[[], str]
) -> None:
    config = Config.load(file)
    # It refuses calls for up to a second, and Python takes some to end.
    assert int(seconds()) >= config.drain_delay_s + config.grace_s + 5


def test_ports_and_paths_are_those_of_the_settings() -> None:
    config = Config.load(BASE / "jacserve.toml")
    deployment = (BASE / "deployment.yaml").read_text()
    assert re.findall(r"containerPort: (\d+)", deployment) == [
        str(config.port),
        str(config.metrics_port),
    ]
    assert f'prometheus.io/port: "{config.metrics_port}"' in deployment
    assert set(re.findall(r" port: (\d+)", deployment)) == {str(config.port)}
    assert config.tokens_file is not None
    assert f"mountPath: {config.tokens_file.parent}\n" in deployment
    listed = re.findall(
        r"^      - (\S+\.(?:toml|py))$", (BASE / "kustomization.yaml").read_text(), re.M
    )
    image = (DEPLOY / "Dockerfile").read_text()
    for name in listed:
        assert (BASE / name).exists()
        assert f'"/etc/jacserve/{name}"' in image


def test_variables_are_settings() -> None:
    for file in (
        SYSTEMD / "jacserve.service",
        DEPLOY / "Dockerfile",
        BASE / "deployment.yaml",
        DEPLOY / "kubernetes" / "tls" / "kustomization.yaml",
    ):
        named = set(re.findall(r"JACSERVE_([A-Z_]+)", file.read_text()))
        assert named
        assert {name.lower() for name in named} <= set(Config.model_fields)


def test_the_functions_can_be_served() -> None:
    specs = build_catalog(load_registries([str(BASE / "functions.py")])).specs
    assert [spec.qualified_name for spec in specs] == ["polar@1"]
