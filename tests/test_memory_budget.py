"""A flood of large queries: a server's memory stays within what its settings say."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve_server import Registry
from server_process import server_process

registry = Registry()
MIB = 2**20
BUDGET = 256 * MIB
# Beside what is counted, gRPC reads ahead of the server, and writes behind it.
CLIENTS, AHEAD = 12, 24 * MIB


@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x


def memory_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_a_flood_of_large_queries_stays_within_the_budget() -> None:
    settings = {
        "JACSERVE_MAX_QUEUED_BYTES": str(BUDGET),
        "JACSERVE_MAX_PAYLOAD_BYTES": str(48 * MIB),
        "JACSERVE_DEVICE_THREADS": "2",
    }
    # 33 points are padded to 64: 33 MiB are sent, and twice as much is computed.
    points = np.ones((33, MIB // 8))
    with server_process(Path(__file__), "--device", "cpu", **settings) as server:
        target, pid = server.target, server.process.pid
        with jacserve.Client(target, timeout_s=60) as client:
            client.value("double", points[:3])
            before = memory_of(pid)
            stop, most = threading.Event(), [before]

            def watch() -> None:
                while not stop.wait(0.01):
                    most[0] = max(most[0], memory_of(pid))

            def flood(_: int) -> int:
                answered = 0
                with jacserve.Client(target, timeout_s=60) as one:
                    end = time.monotonic() + 12
                    while time.monotonic() < end:
                        try:
                            assert one.value("double", points)[0, 0] == 2.0
                            answered += 1
                        except jacserve.OverloadedError as error:
                            # All at once they would keep out each other for ever.
                            time.sleep(error.retry_after_s * random.uniform(1, 10))
                return answered

            watching = threading.Thread(target=watch)
            watching.start()
            with ThreadPoolExecutor(CLIENTS) as pool:
                answered = list(pool.map(flood, range(CLIENTS)))
            stop.set()
            watching.join()
            assert client.value("double", np.ones(3))[0] == 2.0
    grown = most[0] - before
    print(f"{sum(answered)} answered, {grown / MIB:.0f} MiB more at most")
    assert sum(answered) > 0
    # What is counted; what docs/operating.md allows each connection; and, for each of
    # the two programs that run at once, a copy of its inputs padded to 64 points.
    assert grown < BUDGET + CLIENTS * AHEAD + 2 * 64 * MIB
