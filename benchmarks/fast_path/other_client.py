"""Clients in processes of their own, asked by lines of JSON.

Run as `python -m benchmarks.fast_path.other_client TARGET`. `{"ping_s": 2.0}` makes
empty calls for so long and writes the seconds of each. `{"download": [1024, 128]}`
fetches Jacobians of an elementwise function at so many points of that length, and
writes how much memory this process had before, and at most.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import jacserve
from benchmarks.fast_path.processes import memory_bytes, reset_peak
from jacserve.benching import empty_call
from jacserve.connection import connection

# Between pings: another client that works now and then, not one more load.
_PAUSE_S = 0.002


def ping(target: str, seconds: float) -> list[float]:
    """Makes empty calls with pauses between.

    Args:
        target: The server's address.
        seconds: For how long.

    Returns:
        The seconds that each took.
    """
    found = []
    with empty_call(connection(target, {}), "layer") as empty:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            empty.make()
            found.append(time.perf_counter() - start)
            time.sleep(_PAUSE_S)
    return found


def download(client: jacserve.Client, shape: Sequence[int]) -> dict[str, int]:
    """Fetches Jacobians of an elementwise function.

    Args:
        client: The client.
        shape: Of the points, [b, n].

    Returns:
        Bytes of this process before the call, at most until it had the answer, and of
        the answer.
    """
    points = np.full(shape, 0.5, "f4")
    reset_peak("self")
    before = memory_bytes("self", "VmRSS")
    jacobian = client.jacobian("wave", points)
    return {
        "before": before,
        "peak": memory_bytes("self", "VmHWM"),
        "result": jacobian.nbytes,
    }


def main() -> None:
    """Answers until stdin ends."""
    [target] = sys.argv[1:]
    with jacserve.Client(target) as client:
        for line in sys.stdin:
            request: dict[str, Any] = json.loads(line)
            if "ping_s" in request:
                answer: Any = ping(target, request["ping_s"])
            else:
                answer = download(client, request["download"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
