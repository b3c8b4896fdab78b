"""The clients of the soak: processes that are killed and replaced."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from benchmarks.fast_path.processes import ROOT
from benchmarks.soak.credentials import Credentials

_ENDS_WITHIN_S = 180.0


class Clients(AbstractContextManager["Clients"]):
    """Some clients at a time.

    Attributes:
        told: What they have done, in order.
        kills: How many were killed.
    """

    def __init__(
        self, targets: Sequence[str], folder: Path, credentials: Credentials, count: int
    ) -> None:
        """Starts them.

        Args:
            targets: Where there may be a server.
            folder: For their ledgers.
            credentials: For a token of each.
            count: How many.
        """
        self._targets = targets
        # Whoever comes in the place of one that was killed is the same to the server.
        self._environments = [
            {**os.environ, **credentials.environment(credentials.create(name)[1])}
            for name in (f"client-{place}" for place in range(count))
        ]
        self._folder = folder
        self._seeds = 0
        self.told: list[dict[str, Any]] = []
        self.kills = 0
        self._readers: list[threading.Thread] = []
        self._processes = [self._started(place) for place in range(count)]

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends those that are left."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _started(self, place: int) -> "subprocess.Popen[str]":
        self._seeds += 1
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.soak.client_process"),
                ",".join(self._targets),
                str(self._folder / f"ledger-{place}"),
                str(self._seeds),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self._environments[place],
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._readers.append(reader)
        return process

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # One that is cut short was written by the killed.
                self.told.append(json.loads(line))

    def kill(self, place: int) -> None:
        """Kills one, and starts another in its place."""
        place %= len(self._processes)
        self._processes[place].kill()
        self._processes[place].wait()
        self.kills += 1
        self._processes[place] = self._started(place)

    def finish(self) -> list[str]:
        """Has them finish what they do; returns what went wrong with that."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        faults: list[str] = []
        for place, process in enumerate(self._processes):
            try:
                status = process.wait(_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                faults.append(f"client {place} did not end")
                continue
            if status:
                faults.append(f"client {place} ended with status {status}")
        for reader in self._readers:
            reader.join(1.0)
        return faults

    def answers(self) -> Counter[str]:
        """Counts the answers that were checked, by activity."""
        counts: Counter[str] = Counter()
        for each in tuple(self.told):
            counts[each["activity"]] += each["answers"]
        return counts
