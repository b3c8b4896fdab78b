"""What a client of the soak does, in turn; each counts the answers that it checked."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError as FutureCancelledError
from pathlib import Path
from typing import Any

import numpy as np

import jacserve
from benchmarks.soak.closed_forms import (
    BY_FUNCTION,
    CUBES,
    CYCLE,
    U,
    V,
    WrongAnswerError,
    check,
)
from jacserve.errors import (
    DeadlineError,
    InvalidRequestError,
    NonFiniteError,
    NotFoundError,
    ServerError,
)

# A call that takes so long is lost.
PATIENCE_S = 120.0
_BATCHES = (1, 5, 64, 300)
_STREAMED = 3_000_000  # 24 MB each way
_MAPPED = 12
_SESSION_CALLS = 60
_JOB_POINTS = 20_000


class Activities:
    """Everything that one client does."""

    def __init__(
        self, client: jacserve.Client, random: np.random.Generator, ledger: Path
    ) -> None:
        """Keeps what it does it with.

        Args:
            client: Connected to the server.
            random: Draws points.
            ledger: A file for the jobs that it has not seen to their end, which
                outlives it.
        """
        self._client = client
        self._random = random
        self._ledger = ledger
        self.all: Mapping[str, Callable[[], int]] = {
            "calls": self.calls,
            "batches": self.batches,
            "streams": self.streams,
            "isolated": self.isolated,
            "sessions": self.sessions,
            "maps": self.maps,
            "jobs": self.jobs,
            "errors": self.errors,
            "timeouts": self.timeouts,
        }

    def _points(self, *shape: int) -> np.ndarray:
        return self._random.uniform(0.5, 2.0, shape)

    def calls(self) -> int:
        """Asks for every quantity, alone and together."""
        count = 0
        x = self._points(3)
        for name in CYCLE:
            count += self._ask("cycle", x, (name,))
        count += self._ask("cycle", self._points(3), tuple(CYCLE))
        for name in CUBES:
            count += self._ask("cubes", x, (name,))
        u = self._points(50)
        result = self._client.evaluate(
            "stencil", u, quantities="jacobian", mode="sparse", timeout_s=PATIENCE_S
        )
        return count + check(result, "stencil", u)

    def _ask(self, function: str, x: np.ndarray, names: Any) -> int:
        options: Any = {}
        if not {"jvp", "hvp"}.isdisjoint(names):
            options["tangents"] = V
        if "vjp" in names:
            options["cotangents"] = U
        result = self._client.evaluate(
            function, x, quantities=names, timeout_s=PATIENCE_S, **options
        )
        return check(result, function, x)

    def batches(self) -> int:
        """Asks for batches of several sizes."""
        return sum(
            self._ask(function, self._points(rows, 3), names)
            for rows in _BATCHES
            for function, names in (
                ("cycle", ("value", "jacobian", "slogdet")),
                ("cubes", ("gradient",)),
            )
        )

    def isolated(self) -> int:
        """Asks a function whose worker others end meanwhile."""
        names = ("value", "jacobian")
        return sum(
            self._ask("steady", self._points(*rows, 3), names)
            for rows in ((), (), (64,), (300,), ())
        )

    def streams(self) -> int:
        """Sends and gets tens of MB."""
        return self._ask("scaled", self._points(_STREAMED), ("value",))

    def sessions(self) -> int:
        """Loops over a session, submits to it, and cancels some of that."""
        count = 0
        with self._client.session() as session:
            for _ in range(_SESSION_CALLS):
                x = self._points(3)
                result = session.evaluate("cycle", x, timeout_s=PATIENCE_S)
                count += check(result, "cycle", x)
            points = [self._points(3) for _ in range(_SESSION_CALLS)]
            submitted = [
                session.submit("cycle", x, quantities="jacobian", timeout_s=PATIENCE_S)
                for x in points
            ]
            for future in submitted[::7]:
                future.cancel()
            for future, x in zip(submitted, points, strict=True):
                try:
                    count += check(future.result(PATIENCE_S), "cycle", x)
                except FutureCancelledError:
                    count += 1
        return count

    def maps(self) -> int:
        """Passes batch after batch."""
        batches = [self._points(500, 3) for _ in range(_MAPPED)]
        results = self._client.map("cycle", iter(batches), timeout_s=PATIENCE_S)
        found = list(results)
        if len(found) != _MAPPED:
            raise WrongAnswerError(f"{len(found)} of {_MAPPED} batches came back")
        pairs = zip(found, batches, strict=True)
        return sum(check(result, "cycle", batch) for result, batch in pairs)

    def errors(self) -> int:
        """Provokes what must fail, each in its way."""
        x = self._points(3)
        provoked: list[tuple[str, Any, type[Exception], dict[str, Any]]] = [
            ("cycle", self._points(4), InvalidRequestError, {}),
            ("cycle", x.astype(int), InvalidRequestError, {}),
            ("nobody", x, NotFoundError, {}),
            ("roots", -x, NonFiniteError, {"require_finite": True}),
            ("failing", x, ServerError, {}),
        ]
        for function, at, kind, options in provoked:
            try:
                self._client.evaluate(
                    function, at, quantities="value", timeout_s=PATIENCE_S, **options
                )
            except kind as error:
                reason = getattr(error, "reason", "")
                if reason in ("", "UNEXPECTED"):
                    raise WrongAnswerError(
                        f"{function} has failed with {error!r}"
                    ) from error
            else:
                raise WrongAnswerError(f"{function} at {at} has not failed")
        return len(provoked)

    def timeouts(self) -> int:
        """Gives up waiting, and then waits."""
        x = self._points(3)
        try:
            self._client.evaluate("slow", x, quantities="value", timeout_s=0.05)
        except DeadlineError:
            pass
        else:
            raise WrongAnswerError("a call of 200 ms took less than 50 ms")
        result = self._client.evaluate(
            "slow", x, quantities="value", timeout_s=PATIENCE_S
        )
        if not np.array_equal(result.value, x):
            raise WrongAnswerError(f"slow at {x} is {result.value}")
        return 2

    def jobs(self) -> int:
        """Creates a job, sees it to its end, and deletes it; another it cancels."""
        count = 0
        for entry in [*self._left(), self._new_entry()]:
            count += self._finish(entry)
        job = self._client.submit_job(
            "cycle", self._points(_JOB_POINTS, 3), timeout_s=PATIENCE_S
        )
        job.cancel(timeout_s=PATIENCE_S)
        state = job.wait(PATIENCE_S).state
        if state not in ("cancelled", "succeeded"):
            raise WrongAnswerError(f"a job that was cancelled is {state}")
        job.delete(timeout_s=PATIENCE_S)
        return count + 1

    def _left(self) -> Iterator[dict[str, Any]]:
        """Yields the jobs that a client before this one has left."""
        if self._ledger.exists():
            for line in self._ledger.read_text().splitlines():
                yield json.loads(line)

    def _new_entry(self) -> dict[str, Any]:
        seed = int(self._random.integers(2**32))
        entry = {"id": f"soak-{seed}-{time.time_ns()}", "seed": seed}
        self._write([*self._left(), entry])
        return entry

    def _write(self, entries: list[dict[str, Any]]) -> None:
        fresh = self._ledger.with_suffix(".new")
        fresh.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        fresh.replace(self._ledger)

    def _finish(self, entry: dict[str, Any]) -> int:
        """Creates a job, or finds it; checks its results, and deletes it."""
        random = np.random.default_rng(entry["seed"])
        points = random.uniform(0.5, 2.0, (_JOB_POINTS, 3))
        job = self._client.submit_job(
            "cycle", points, id=entry["id"], timeout_s=PATIENCE_S
        )
        info = job.wait(PATIENCE_S)
        info.raise_unless_succeeded()
        count, place = 0, 0
        for chunk in job.chunks():
            if chunk.start != place:
                raise WrongAnswerError(f"job {job.id} lacks points from {place}")
            count += check(chunk.result, "cycle", points[chunk.start : chunk.stop])
            place = chunk.stop
        if place != _JOB_POINTS:
            raise WrongAnswerError(f"job {job.id} ends at {place}")
        job.delete(timeout_s=PATIENCE_S)
        self._write([each for each in self._left() if each != entry])
        return count


def check_complete() -> None:
    """Every quantity of the contract is asked for by some activity.

    Raises:
        AssertionError: One is not.
    """
    from jacserve.vocabulary import QUANTITIES

    asked = {name for forms in BY_FUNCTION.values() for name in forms}
    assert asked == set(QUANTITIES), set(QUANTITIES) - asked
