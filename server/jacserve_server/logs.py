"""How the log of a server of its own looks: for people in a terminal, else as JSON.

What is logged goes through Python's `logging` everywhere, so that a server inside
another program logs as that program does; only `jacserve serve` comes here.
"""

import logging
import re
import sys
from typing import TYPE_CHECKING, Literal, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

# A client's words must not move the cursor, nor look like a line of their own. C0 and
# C1 controls, and what else Unicode has to end lines and turn text around.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_log = logging.getLogger(__name__)
# What gRPC raises where a client is gone, or has sent what is no text.
_OF_PEERS = {
    "AbortError",
    "CancelledError",
    "ExecuteBatchError",
    "InternalError",
    "UnicodeDecodeError",
    "UsageError",
}


class _Calm(logging.Filter):
    """Takes out what gRPC logs of its peers: tracebacks, and headers as they came.

    Strangers could fill the log with them, and a header may have a token in it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        raised = record.exc_info and record.exc_info[0]
        if not raised or raised.__name__ not in _OF_PEERS:
            return True
        _log.debug("gRPC has ended a call: %s", raised.__name__)
        return False


def configure(
    log_format: Literal["auto", "text", "json"],
    level: str,
    stream: TextIO | None = None,
) -> None:
    """Has the whole process log like this.

    Args:
        log_format: "auto" is text where the stream is a terminal.
        level: The least that jacserve logs, such as "info"; of other packages it is
            warnings, unless this is more.
        stream: Where to; None for stderr.
    """
    out = sys.stderr if stream is None else stream
    is_terminal = out.isatty()
    is_text = log_format == "text" or (log_format == "auto" and is_terminal)
    common: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor] = (
        [_escaped, structlog.dev.ConsoleRenderer(colors=is_terminal, sort_keys=False)]
        if is_text
        else [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    )
    renderers.insert(0, structlog.stdlib.ProcessorFormatter.remove_processors_meta)
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=renderers, foreign_pre_chain=common
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("grpc._cython.cygrpc").filters[:] = [_Calm()]
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger("jacserve_server").setLevel(number)


def _escaped(logger: "WrappedLogger", name: str, event: "EventDict") -> "EventDict":
    """Makes control characters visible; tracebacks keep their lines."""
    if (info := event.pop("exc_info", None)) is not None:
        event["exception"] = structlog.processors.ExceptionRenderer()(
            logger, name, {"exc_info": info}
        )["exception"]
    for key, value in event.items():
        if isinstance(value, str):
            lines = value.split("\n") if key == "exception" else [value]
            event[key] = "\n".join(_CONTROLS.sub(_code, line) for line in lines)
    return event


def _code(found: "re.Match[str]") -> str:
    return found[0].encode("unicode_escape").decode()
