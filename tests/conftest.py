import os
import tempfile
from collections.abc import Iterator

import pytest

import jacserve
import zoo
from jacserve_server import RunningServer, serving

# What was measured on this machine must not decide what the tests see.
CACHE = tempfile.TemporaryDirectory(prefix="jacserve-tests-")
os.environ["JACSERVE_CACHE_DIR"] = CACHE.name
# Nor the jobs of whoever runs the tests.
os.environ["JACSERVE_JOBS_DIR"] = f"{CACHE.name}/jobs"


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server of the zoo, in this process, on a free port."""
    with serving(zoo.registry) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[jacserve.Client]:
    with jacserve.Client(server.target) as connected:
        yield connected


# These try very many combinations of the same few things.
COMBINATIONS = {
    "test_agreement.py",
    "test_bad_vectors.py",
    "test_checking.py",
    "test_determinants.py",
    "test_jobs.py",
    "test_laws.py",
    "test_products.py",
    "test_sources.py",
    "test_sparse.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves four of five combinations to the slow tests."""
    combined = [
        item
        for item in items
        if item.path.name in COMBINATIONS and hasattr(item, "callspec")
    ]
    for place, item in enumerate(combined):
        if place % 5:
            item.add_marker(pytest.mark.slow)
