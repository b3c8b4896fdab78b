"""Spans of calls, by gRPC's own instrumentation for OpenTelemetry."""

from typing import Any

from jacserve_server.callers import Call
from jacserve_server.calls import Observer
from jacserve_server.errors import ServiceError


class TelemetryError(Exception):
    """Spans can't be sent; the text says what to do."""


class Telemetry:
    """Makes spans of calls, and says in them what they were about.

    Attributes:
        interceptor: gRPC's, which makes them.
    """

    def __init__(self) -> None:
        """Sends spans by OTLP over HTTP, as the OTEL_ environment has it.

        Raises:
            TelemetryError: The packages for it are not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                OTLPSpanExporter,
            )
            from opentelemetry.instrumentation.grpc import aio_server_interceptor
            from opentelemetry.sdk.resources import (
                SERVICE_NAME,
                OTELResourceDetector,
                Resource,
            )
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise TelemetryError(
                f"open_telemetry needs {error.name}, which is not installed. Run: "
                'pip install "jacserve[otel]"'
            ) from error
        resource = Resource.create({SERVICE_NAME: "jacserve"})
        # A provider of its own: that of the process, whose guest this may be, stays.
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect())
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._trace = trace
        self.interceptor: Any = aio_server_interceptor(tracer_provider=self._provider)

    def note(self, call: Call, failure: BaseException | None) -> None:
        """Says in the span of a call what it was about.

        Args:
            call: The call that has ended.
            failure: Why it has no answer; None where it has one.
        """
        span = self._trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attribute("jacserve.request_id", call.request_id)
        if call.function:
            span.set_attribute("jacserve.function", call.function)
        if call.execute_s:
            span.set_attribute("jacserve.queue_s", call.queue_s)
            span.set_attribute("jacserve.compile_s", call.compile_s)
            span.set_attribute("jacserve.execute_s", call.execute_s)
        if isinstance(failure, ServiceError):
            span.set_attribute("jacserve.reason", failure.reason)

    def close(self) -> None:
        """Sends what is left. It may block for as long as the exporter's timeout."""
        self._provider.shutdown()


class TracingObserver:
    """Hears of calls that have ended, and notes them in their spans, too."""

    def __init__(self, observer: Observer, telemetry: Telemetry) -> None:
        """Keeps its collaborators.

        Args:
            observer: Counts and logs calls.
            telemetry: Has their spans.
        """
        self._observer = observer
        self._telemetry = telemetry

    def ended(
        self, call: Call | None, method: str, failure: BaseException | None
    ) -> None:
        """Takes note of a call; see `calls.Observer`."""
        self._observer.ended(call, method, failure)
        # Queries of a session have no span: theirs would be in the stream's.
        if call is not None and not call.is_query:
            self._telemetry.note(call, failure)
