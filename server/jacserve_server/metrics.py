"""What Prometheus is told, on a port of its own.

Nothing is counted here: each scrape reads what the server counts anyway. It is answered
in a thread, which has the event loop copy the numbers and does all else itself.
"""

import asyncio
import logging
import socket
import socketserver
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from jacserve.v1 import admin_pb2 as pb
from jacserve_server.isolation.supervisor import WorkerState
from jacserve_server.overview import Overview
from jacserve_server.tallies import Histogram, Tallies

# Scrapes at once; whoever holds so many connections open keeps others out, not us busy.
_MOST_SCRAPES = 8
_log = logging.getLogger(__name__)


def families(
    status: pb.ServerStatus, tallies: Tallies, workers: Iterable[WorkerState]
) -> Iterator[Metric]:
    """Yields a server's metrics.

    Args:
        status: How it is.
        tallies: What it has counted.
        workers: The processes that isolated functions run in.
    """
    yield from _call_families(tallies)
    yield from _computed_families(tallies)
    yield from _load_families(status)
    yield from _machine_families(status)
    yield from _isolation_families(status, workers)
    yield _gauge("health_serving", "Whether health says SERVING.", status.is_serving)
    build = GaugeMetricFamily(
        "jacserve_build_info",
        "The version of jacserve, as a label.",
        labels=["version"],
    )
    build.add_metric([status.version], 1)
    yield build


def _call_families(tallies: Tallies) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "jacserve_calls",
        "Calls that have ended, and queries of sessions. The function is empty where "
        "it is not known, the reason where there is none.",
        labels=["method", "function", "code", "reason"],
    )
    for labels, count in tallies.calls.items():
        calls.add_metric(labels, count)
    yield calls
    seconds = HistogramMetricFamily(
        "jacserve_call_seconds",
        "From the arrival of calls and queries of sessions to their answers.",
        labels=["method", "function"],
    )
    for labels, histogram in tallies.seconds.items():
        _add(seconds, labels, histogram)
    yield seconds


def _computed_families(tallies: Tallies) -> Iterator[Metric]:
    texts = {
        "queue": "What queries waited for a device.",
        "compile": "What queries waited for their program, of those that did.",
        "execute": "The runs that answered queries.",
    }
    for name, text in texts.items():
        seconds = HistogramMetricFamily(
            f"jacserve_{name}_seconds", text, labels=["function"]
        )
        for function, computed in tallies.computed.items():
            _add(seconds, [function], getattr(computed, name))
        yield seconds
    together = HistogramMetricFamily(
        "jacserve_coalesced_points",
        "For each query of one point, how many points its run computed together.",
    )
    _add(together, [], tallies.together)
    yield together
    yield _counter(
        "job_points", "Points that were computed for jobs.", tallies.job_points
    )


def _load_families(status: pb.ServerStatus) -> Iterator[Metric]:
    load, programs = status.load, status.programs
    for name, text, value in (
        ("queries_in_flight", "Queries that have no answer yet.", load.query_count),
        ("bytes_in_flight", "Bytes of queries and of large results.", load.size_bytes),
        ("waiting", "Pieces of work that wait for a device.", load.waiting_count),
        (
            "background_waiting",
            "Pieces of work of jobs that wait for a device.",
            load.background_count,
        ),
        ("streams_open", "Streams that are open.", load.stream_count),
        ("programs", "Compiled programs that are kept.", programs.count),
    ):
        yield _gauge(name, text, value)
    yield _counter(
        "program_hits",
        "Queries and batches of jobs that found their program.",
        programs.hit_count,
    )
    yield _counter(
        "program_misses",
        "Queries and batches of jobs that had to wait for their program.",
        programs.miss_count,
    )


def _machine_families(status: pb.ServerStatus) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        "jacserve_device_memory_bytes",
        "Memory that JAX has in use, and may use; not of devices that can't tell.",
        labels=["device", "kind"],
    )
    for device in status.devices:
        if device.limit_bytes:
            memory.add_metric([device.name, "used"], device.used_bytes)
            memory.add_metric([device.name, "limit"], device.limit_bytes)
    yield memory
    jobs = GaugeMetricFamily("jacserve_jobs", "Jobs in the table.", labels=["state"])
    for state, count in status.jobs.items():
        jobs.add_metric([state], count)
    yield jobs


def _isolation_families(
    status: pb.ServerStatus, workers: Iterable[WorkerState]
) -> Iterator[Metric]:
    restarts = CounterMetricFamily(
        "jacserve_worker_restarts",
        "How often processes were started anew that isolated functions run in.",
        labels=["device", "cause"],
    )
    for worker in workers:
        for cause, count in worker.restarts.items():
            restarts.add_metric([worker.device, cause], count)
    yield restarts
    quarantined = GaugeMetricFamily(
        "jacserve_quarantined",
        "1 for each function that is not run any more.",
        labels=["function"],
    )
    for function in status.functions:
        if function.quarantine_reason:
            quarantined.add_metric([function.name.removeprefix("functions/")], 1)
    yield quarantined


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"jacserve_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"jacserve_{name}", text, value=value)


def _add(
    family: HistogramMetricFamily, labels: Iterable[str], histogram: Histogram
) -> None:
    buckets, total = [], 0
    for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound is None else f"{bound:.10g}", float(total)))
    family.add_metric(list(labels), buckets, histogram.total)


class _NoAnswerError(Exception):
    """The event loop does not answer."""


class _ServerCollector(Collector):
    """Reads a server's numbers when it is scraped, in whatever thread that is."""

    def __init__(
        self, overview: Overview, loop: asyncio.AbstractEventLoop, patience_s: float
    ) -> None:
        self._overview = overview
        self._loop = loop
        self._patience_s = patience_s

    def collect(self) -> Iterable[Metric]:
        looking = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        try:
            return families(*looking.result(self._patience_s))
        except (TimeoutError, CancelledError) as error:
            looking.cancel()
            raise _NoAnswerError from error

    async def _look(self) -> tuple[pb.ServerStatus, Tallies, Sequence[WorkerState]]:
        overview = self._overview
        return await overview.status(), overview.tallies.copy(), overview.workers()


class _Handler(MetricsHandler):
    # Else it would tell the version of Python.
    server_version, sys_version = "jacserve", ""
    # Seconds for each read and write.
    timeout = 10

    def do_GET(self) -> None:  # noqa: N802
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        try:
            super().do_GET()
        except _NoAnswerError:
            self.send_error(503)


class _HttpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, family: socket.AddressFamily, address: Any, handler: type[_Handler]
    ) -> None:
        self.address_family = family
        self._places = threading.BoundedSemaphore(_MOST_SCRAPES)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # There is no thread for it.
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scrape has failed", exc_info=True)


class MetricsPort:
    """Answers scrapes on a port of its own.

    Attributes:
        url: Where, such as "http://127.0.0.1:9464/metrics".
    """

    def __init__(
        self,
        overview: Overview,
        loop: asyncio.AbstractEventLoop,
        *,
        host: str,
        port: int,
        patience_s: float = 8.0,
    ) -> None:
        """Opens the port, and answers in threads from now on.

        Args:
            overview: Tells how the server is.
            loop: The server's event loop.
            host: Address to listen on.
            port: TCP port; 0 takes a free one.
            patience_s: Seconds after which a scrape has failed where the event loop
                does not answer, which is the news then.

        Raises:
            OSError: The address can't be listened on.
        """
        # A registry of its own: there may be several servers in a process.
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_ServerCollector(overview, loop, patience_s))
        ProcessCollector(registry=registry)
        handler = type("Handler", (_Handler,), {"registry": registry})
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        self._server = _HttpServer(family, address, handler)
        bound = self._server.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{bound}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Closes the port. It may block for a moment."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
