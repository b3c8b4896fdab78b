"""Those beside the clients, in threads: a witness, a guest, and a vandal.

They are never killed, so they know what has happened: the witness how often it has
called, the guest whether its token holds, the vandal what it has done to the worker.
"""

import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import jacserve
from benchmarks.soak.activities import PATIENCE_S
from benchmarks.soak.closed_forms import WrongAnswerError
from benchmarks.soak.credentials import Credentials
from benchmarks.soak.functions import NEVER_ENDS, SEGFAULTS
from jacserve.errors import (
    AccessError,
    CancelledError,
    InvalidRequestError,
    JacobianError,
    OverloadedError,
    UnavailableError,
)

_PAUSE_S = 0.25
# A server looks at its file of tokens once a second.
_REVOKED_WITHIN_S = 15.0
_GUEST_EVERY_S = 6.0
_VANDAL_EVERY_S = 20.0
_BUSY = (UnavailableError, OverloadedError, CancelledError)
X = np.array([0.5, 1.0, 2.0])
WHAT_MUST_BE_SEEN = (
    "scrapes that agree with the witness",
    "refusals of a token that was revoked",
    "calls with the token that replaced it",
    "WORKER_DIED",
    "TIME_BUDGET_SPENT",
    "FUNCTION_QUARANTINED",
    "SCOPE_MISSING",
    "released, and right again",
)


class Roles(AbstractContextManager["Roles"]):
    """The witness, the guest and the vandal.

    Attributes:
        done: How often each thing was seen that had to be.
        faults: What was seen that had not to be.
    """

    def __init__(self, target: str, metrics_url: str, credentials: Credentials) -> None:
        """Begins nothing yet.

        Args:
            target: The server.
            metrics_url: Where it tells its metrics.
            credentials: For tokens of their own.
        """
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self._target = target
        self._metrics_url = metrics_url
        self._credentials = credentials
        self._is_over = threading.Event()
        # What the witness has called of the server that there is now.
        self._called: Counter[str] = Counter()
        self._is_there = threading.Event()
        self._witnessing = threading.Lock()
        self._guest_id, self._guest_token = credentials.create("guest")
        self._witness = self._client(credentials.create("witness")[1])
        self._vandal = self._client(credentials.create("vandal")[1])
        self._admin = self._client(credentials.create("admin", ["admin", "read"])[1])
        self._threads = [
            threading.Thread(target=self._repeated, args=each, daemon=True)
            for each in (
                (self._witness_once, _PAUSE_S),
                (self._be_guest, _GUEST_EVERY_S),
                (self._be_vandal, _VANDAL_EVERY_S),
            )
        ]

    def __enter__(self) -> Self:
        """Begins."""
        self._is_there.set()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends, when what has begun is done."""
        self.finish()
        for client in (self._witness, self._vandal, self._admin):
            client.close()

    def finish(self) -> None:
        """Ends what they do, and compares counts for the last time."""
        if not self._is_over.is_set():
            self._is_over.set()
            for thread in self._threads:
                thread.join(2 * PATIENCE_S)

    def server_goes(self) -> None:
        """Has the witness wait: a call that is cut short may count or not."""
        self._is_there.clear()
        with self._witnessing:
            self._called.clear()

    def server_is_back(self) -> None:
        """Has it go on: a server that starts has counted nothing."""
        self._is_there.set()

    def _client(self, token: str) -> jacserve.Client:
        return jacserve.Client(self._target, token=token, ca=self._credentials.ca)

    def _repeated(self, act: Callable[[], None], every_s: float) -> None:
        while not self._is_over.wait(every_s):
            try:
                act()
            except _BUSY:
                continue  # It was away, or has gone meanwhile.
            except Exception:
                self.faults.append(traceback.format_exc())

    def _witness_once(self) -> None:
        """Calls, rightly and wrongly; compares that with what the server counted."""
        if not self._is_there.wait(_PAUSE_S):
            return
        with self._witnessing:
            if not self._is_there.is_set():
                return
            for _ in range(5):
                found = self._witness.value("witnessed", X, timeout_s=PATIENCE_S)
                _agree("value of witnessed", found, 3 * X)
                self._called["OK"] += 1
            try:
                self._witness.value("witnessed", X[:2], timeout_s=PATIENCE_S)
            except InvalidRequestError as error:
                self._called[error.code] += 1
            counted = calls_in(self._scraped(), "witnessed@1")
            if counted != self._called:
                raise WrongAnswerError(f"counted {counted}, called {self._called}")
            self.done["scrapes that agree with the witness"] += 1

    def _scraped(self) -> str:
        with urllib.request.urlopen(self._metrics_url, timeout=PATIENCE_S) as answer:
            return answer.read().decode()

    def _be_guest(self) -> None:
        """Calls with a token, loses it, is refused, and gets another."""
        with self._client(self._guest_token) as client, client.session() as session:
            calls: list[Callable[..., Any]] = [client.evaluate, session.evaluate]
            for call in calls:
                found = call("cycle", X, quantities="value", timeout_s=PATIENCE_S)
                _agree("value of cycle", found.value, X * np.roll(X, -1))
            self._credentials.revoke(self._guest_id)
            try:
                for call in calls:
                    _until_refused(call)
                    self.done["refusals of a token that was revoked"] += 1
            finally:
                self._guest_id, self._guest_token = self._credentials.create("guest")
        with self._client(self._guest_token) as client:
            _until_let_in(client)
            self.done["calls with the token that replaced it"] += 1

    def _be_vandal(self) -> None:
        """Ends the worker in two ways, is shut out, and is let in again."""
        self._admin.release("wild", timeout_s=PATIENCE_S)
        for place, reason in (
            (SEGFAULTS, "WORKER_DIED"),
            (NEVER_ENDS, "TIME_BUDGET_SPENT"),
            (1.0, "FUNCTION_QUARANTINED"),
        ):
            self._expect(reason, lambda at=place: self._wild(at))
        self._expect("SCOPE_MISSING", lambda: self._vandal.release("wild"))
        if not any(
            each.quarantine_reason
            for each in self._admin.status(timeout_s=PATIENCE_S).functions
        ):
            raise WrongAnswerError("the status does not tell who is in quarantine")
        self._admin.release("wild", timeout_s=PATIENCE_S)
        _agree("value of wild", self._wild(1.0), np.array([1.0, 1.0, 2.0]))
        self.done["released, and right again"] += 1

    def _wild(self, first: float) -> Any:
        x = np.array([first, 1.0, 2.0])
        return self._vandal.value("wild", x, timeout_s=PATIENCE_S)

    def _expect(self, reason: str, call: Callable[[], object]) -> None:
        try:
            call()
        except _BUSY:
            raise
        except JacobianError as error:
            if error.reason != reason:
                raise
            self.done[reason] += 1
        else:
            raise WrongAnswerError(f"an answer came in place of {reason}")


def calls_in(metrics: str, function: str) -> Mapping[str, int]:
    """Counts the calls of a function in the text of metrics, by code."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            labels = sample.labels
            is_call = sample.name == "jacserve_calls_total"
            if is_call and labels["function"] == function:
                counts[labels["code"]] += int(sample.value)
    return counts


def _agree(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.allclose(found, expected, 1e-7):
        raise WrongAnswerError(f"{what} is {found}, not {expected}")


def _until_refused(call: Callable[..., Any]) -> None:
    deadline = time.monotonic() + _REVOKED_WITHIN_S
    while time.monotonic() < deadline:
        try:
            call("cycle", X, quantities="value", timeout_s=PATIENCE_S)
        except AccessError as error:
            if error.reason != "TOKEN_INVALID":
                raise
            return
        time.sleep(_PAUSE_S)
    raise WrongAnswerError(f"a token holds {_REVOKED_WITHIN_S:.0f} s after its end")


def _until_let_in(client: jacserve.Client) -> None:
    deadline = time.monotonic() + _REVOKED_WITHIN_S
    while True:
        try:
            found = client.value("cycle", X, timeout_s=PATIENCE_S)
        except AccessError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)
        else:
            return _agree("value of cycle", found, X * np.roll(X, -1))
