"""Stores that vanish beneath a job are held up for, not failed."""

import errno
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jacserve_server.errors import ServiceError
from jacserve_server.jobs import results, storage
from jacserve_server.jobs.plans import RowSource, Task
from jacserve_server.jobs.results import Leaf, Results
from jacserve_server.jobs.storage import locate
from jacserve_server.work import Computation, InputSpec

LEAF = Leaf("value", (), "float64", (3,), "", None)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A job of ten rows."""
    roots = {"data": str(tmp_path)}
    x = RowSource(locate("data/x.npy", roots, field=""), "", True)
    computation = Computation(
        "f@1", ("value",), (), None, "matrix", (InputSpec((3,), "float64", True),)
    )
    output = locate("data/store", roots, field="")
    return Task("job", "turn", computation, (x,), 10, output)


@pytest.fixture
def opened(task: Task) -> Results:
    """Its store, in chunks of five, opened by the job that owns it."""
    results.create(task, [LEAF], 5, {})
    return Results(task.output, "job", is_writable=True)


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


def test_a_store_that_is_removed_in_part_is_made_again(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the removal has stopped, as at the end of the server."""
    left = 0
    real = {name: getattr(os, name) for name in ("unlink", "rmdir")}

    def limited(name: str, path: Any, **options: Any) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left -= 1
        real[name](path, **options)

    limit, is_removed = 0, False
    while not is_removed:
        results.create(task, [LEAF], 5, {})
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, partial(limited, name))
            left = limit
            with suppress(ServiceError):
                storage.remove(task.output)
                is_removed = True
        limit += 1
    assert limit > 3
    assert not (tmp_path / "store").exists()
