"""Takes note of calls: counts each, and has a line of the log for it."""

import logging
import time

from google.rpc import code_pb2

from jacserve_server.callers import Call
from jacserve_server.errors import ServiceError
from jacserve_server.tallies import Tallies

_log = logging.getLogger(__name__)
_CODES: dict[int, str] = {number: name for name, number in code_pb2.Code.items()}


class CallObserver:
    """Hears of calls that have ended. Used from one event loop."""

    def __init__(self, tallies: Tallies) -> None:
        """Keeps its collaborators.

        Args:
            tallies: Counts calls.
        """
        self._tallies = tallies

    def ended(
        self, call: Call | None, method: str, failure: BaseException | None
    ) -> None:
        """Takes note of a call; see `calls.Observer`."""
        code, reason = "OK", ""
        if isinstance(failure, ServiceError):
            code, reason = _CODES[failure.code], failure.reason
        elif isinstance(failure, TimeoutError):
            code = "DEADLINE_EXCEEDED"
        elif failure is not None:
            code = "CANCELLED"
        if call is None:
            self._tallies.count_call(method, "", code, reason, None)
            return
        seconds = time.perf_counter() - call.start
        self._tallies.count_call(method, call.function, code, reason, seconds)
