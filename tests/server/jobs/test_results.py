"""Stores that vanish beneath a job are held up for, not failed."""

from pathlib import Path

import numpy as np
import pytest

from jacserve_server.errors import ServiceError
from jacserve_server.jobs import results
from jacserve_server.jobs.plans import RowSource, Task
from jacserve_server.jobs.results import Leaf, Results
from jacserve_server.jobs.storage import locate
from jacserve_server.work import Computation, InputSpec


@pytest.fixture
def opened(tmp_path: Path) -> Results:
    """A store of ten rows in chunks of five, opened by the job that owns it."""
    roots = {"data": str(tmp_path)}
    x = RowSource(locate("data/x.npy", roots, field=""), "", True)
    computation = Computation(
        "f@1", ("value",), (), None, "matrix", (InputSpec((3,), "float64", True),)
    )
    output = locate("data/store", roots, field="")
    task = Task("job", "turn", computation, (x,), 10, output)
    leaf = Leaf("value", (), "float64", (3,), "", None)
    results.create(task, [leaf], 5, {})
    return Results(output, "job", is_writable=True)


def test_a_store_that_vanishes_may_come_back(opened: Results, tmp_path: Path) -> None:
    rows, finite = np.ones((5, 3)), np.ones(5, bool)
    opened.write(0, [rows], finite)
    (tmp_path / "store").rename(tmp_path / "away")
    for use in (lambda: opened.sync([0]), lambda: opened.write(5, [rows], finite)):
        with pytest.raises(ServiceError) as raised:
            use()
        assert raised.value.reason == "STORAGE_UNAVAILABLE"
    (tmp_path / "away").rename(tmp_path / "store")
    opened.sync([0])
    opened.write(5, [rows], finite)
    assert opened.read_finite(0, 10).all()
