"""Spans as a collector gets them."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Array, Float
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

import jacserve
from jacserve_server import Registry, serving

FUNCTIONS = """
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x ** 2
"""


class Collector(HTTPServer):
    """Collects spans."""

    def __init__(self) -> None:
        received = self.received = list[ExportTraceServiceRequest]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def spans(self) -> list[Span]:
        return [
            span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as running:
        url = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, object]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
        for each in span.attributes
    }


def test_each_call_is_a_span(collector: Collector) -> None:
    registry = Registry()

    @registry.function
    def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return x**2

    with serving(registry, open_telemetry=True) as server:
        with jacserve.Client(server.target) as client:
            client.jacobian("square", np.ones(3))
            client.value("square", np.ones(400_000))  # By stream.
            with pytest.raises(LookupError) as caught:
                client.jacobian("nothing", [1.0])
            with client.session() as session:
                session.jacobian("square", np.ones(3))
    [resource] = {
        tuple(sorted((a.key, a.value.string_value) for a in each.resource.attributes))
        for request in collector.received
        for each in request.resource_spans
    }
    assert ("service.name", "jacserve") in resource
    assert ("deployment.environment", "test") in resource
    found = {span.name.rpartition("/")[2]: span for span in collector.spans()}
    assert set(found) == {"Evaluate", "EvaluateStream", "Session"}
    assert len(collector.spans()) == 4
    assert all(span.kind == Span.SPAN_KIND_SERVER for span in collector.spans())
    evaluated, failed = (
        next(
            span
            for span in collector.spans()
            if span.name.endswith("/Evaluate")
            and ("jacserve.reason" in attributes(span)) is is_error
        )
        for is_error in (False, True)
    )
    assert attributes(evaluated)["jacserve.function"] == "square@1"
    assert attributes(evaluated)["rpc.method"] == "Evaluate"
    assert attributes(found["EvaluateStream"])["jacserve.function"] == "square@1"
    assert "jacserve.function" not in attributes(found["Session"])
    assert isinstance(caught.value, jacserve.JacobianError)
    assert attributes(failed)["jacserve.request_id"] == caught.value.request_id
    assert attributes(failed)["jacserve.reason"] == "FUNCTION_NOT_FOUND"


def test_without_the_extra_the_server_says_what_to_install(tmp_path: Path) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    code = f"""
import sys
sys.modules["opentelemetry"] = None
sys.argv = ["jacserve", "serve", {str(file)!r}, "--port", "0", "--open-telemetry"]
from jacserve.__main__ import main
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert 'pip install "jacserve[otel]"' in ended.stderr
    assert "Traceback" not in ended.stderr
