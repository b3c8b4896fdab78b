"""Takes note of calls: counts each, and has a line of the log for it."""

import logging
import time

from google.rpc import code_pb2

from jacserve_server.callers import Call
from jacserve_server.errors import CODES, ServiceError
from jacserve_server.tallies import Tallies

_log = logging.getLogger(__name__)
_CODES: dict[int, str] = {number: name for name, number in code_pb2.Code.items()}


# Of the server, or of the functions it was given; an unexpected one is logged with its
# traceback, where it is explained.
_FAULTS = {
    reason
    for reason, code in CODES.items()
    if code == code_pb2.INTERNAL and reason != "UNEXPECTED"
}


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
            _log.debug("refused", extra={"method": method, "reason": reason})
            return
        seconds = time.perf_counter() - call.start
        self._tallies.count_call(method, call.function, code, reason, seconds)
        level = logging.ERROR if reason in _FAULTS else logging.DEBUG
        if _log.isEnabledFor(level):
            _log.log(level, "call", extra=_particulars(call, code, failure, seconds))


def _particulars(
    call: Call, code: str, failure: BaseException | None, seconds: float
) -> dict[str, object]:
    """Returns what the log has of a call; what there is not, it does not have."""
    found = {
        "method": call.method,
        "function": call.function,
        "code": code,
        "identity": call.caller.identity,
        "peer": call.caller.peer,
        "request_id": call.request_id,
        "seconds": round(seconds, 6),
        "queue_s": round(call.queue_s, 6),
        "compile_s": round(call.compile_s, 6),
        "execute_s": round(call.execute_s, 6),
    }
    if isinstance(failure, ServiceError):
        found |= {"reason": failure.reason, "error": failure.message}
    return {name: value for name, value in found.items() if value}
