from collections.abc import Iterator

import pytest

import jacserve
import zoo
from jacserve_server import RunningServer, serving


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server of the zoo, in this process, on a free port."""
    with serving(zoo.registry) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[jacserve.Client]:
    with jacserve.Client(server.target) as connected:
        yield connected
