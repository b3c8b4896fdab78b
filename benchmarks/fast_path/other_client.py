"""Clients in processes of their own, asked by lines of JSON.

Run as `python -m benchmarks.fast_path.other_client TARGET`. `{"ping_s": 2.0}` makes
empty calls for so long and writes the seconds that each took. `{"download_n": 4096}`
fetches one Jacobian [n, n] and writes how much memory this process had before, and at
most.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from benchmarks.fast_path.processes import memory_bytes, reset_peak

import jacserve
from jacserve.benching import empty_call

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
    with empty_call(target, "layer") as empty:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            empty.make()
            found.append(time.perf_counter() - start)
            time.sleep(_PAUSE_S)
    return found


def download(client: jacserve.Client, n: int) -> dict[str, int]:
    """Fetches the Jacobian of an elementwise function.

    Args:
        client: The client.
        n: The size: n x n numbers of four bytes.

    Returns:
        Bytes of this process before the call, at most until it had the answer, and of
        the answer.
    """
    x = np.full(n, 0.5, "f4")
    reset_peak("self")
    before = memory_bytes("self", "VmRSS")
    jacobian = client.jacobian("wave", x)
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
                answer = download(client, request["download_n"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
