"""A client in a process of its own, which may be killed at any moment.

Run as `python -m benchmarks.soak.client_process TARGETS LEDGER SEED`, with its token
and whom it trusts in the environment. It does one activity after another until stdin
ends, and writes a line of JSON about each.
"""

import json
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np

import jacserve
from benchmarks.soak.activities import PATIENCE_S, Activities
from benchmarks.soak.closed_forms import WrongAnswerError
from jacserve.errors import CancelledError, OverloadedError, UnavailableError

_PAUSE_S = 0.2
_CALLS_A_CLIENT = 12


def main() -> None:
    """Acts until stdin ends."""
    target, ledger, seed = sys.argv[1:]
    random = np.random.default_rng(int(seed))
    is_over = threading.Event()
    threading.Thread(
        target=lambda: (sys.stdin.read(), is_over.set()), daemon=True
    ).start()
    while not is_over.is_set():
        # A connection of its own for some activities, and then a new one.
        with jacserve.Client(target.split(",")) as client:
            activities = Activities(client, random, Path(ledger))
            names = random.permutation(list(activities.all))
            for name in [*names, *random.choice(names, _CALLS_A_CLIENT - len(names))]:
                if is_over.is_set():
                    break
                print(json.dumps(_act(activities, str(name))), flush=True)


def _act(activities: Activities, name: str) -> dict[str, object]:
    """Does an activity, again where the server was away or too busy."""
    told: dict[str, object] = {"activity": name, "answers": 0}
    away: list[float] = []
    start = time.monotonic()
    refusals = cancelled = 0
    while True:
        try:
            told["answers"] = activities.all[name]()
            break
        except WrongAnswerError as error:
            told["wrong"] = str(error)
            break
        except (UnavailableError, OverloadedError, CancelledError) as error:
            if isinstance(error, OverloadedError):
                refusals += 1
            else:
                away.append(time.monotonic())
                # A server that stops may cancel what it has not begun.
                cancelled += isinstance(error, CancelledError)
            if time.monotonic() - start > PATIENCE_S:
                told["lost"] = repr(error)
                break
            time.sleep(getattr(error, "retry_after_s", 0.0) or _PAUSE_S)
        except Exception:
            told["lost"] = traceback.format_exc()
            break
    return {
        **told,
        "away": away,
        "refusals": refusals,
        "cancelled": cancelled,
        "at": time.monotonic(),
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    main()
