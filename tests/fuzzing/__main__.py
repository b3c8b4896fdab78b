"""Fuzzes the decoders: `python -m fuzzing [--guided] COUNT SEED [LAW...]`.

Guided, atheris prefers messages that lead to code that none has led to. Otherwise
each is a mutation of one that is right. Either way the same arguments give the same
messages, COUNT of them, and the process ends with a line of JSON: what was taken and
refused by each decoder, and how much memory was added after the first quarter.

A message that breaks a law is printed, in hexadecimal, with what it broke.
"""

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import psutil

# Of each decoder, how many messages that it has taken are mutated further; none that
# is longer.
KEPT = 500
LONGEST_KEPT = 2000


def main() -> None:
    arguments = sys.argv[1:]
    is_guided = "--guided" in arguments
    count, seed, *names = [each for each in arguments if each != "--guided"]
    if is_guided:
        import atheris

        instrument: Any = atheris.instrument_imports  # pyright: ignore[reportAttributeAccessIssue]
        with instrument(include=["jacserve", "jacserve_server"]):
            from fuzzing.laws import laws
    else:
        from fuzzing.laws import laws
    np.seterr(all="ignore")
    known = laws()
    trial = Trial({name: known[name] for name in names or known}, int(count), int(seed))
    if is_guided:
        trial.run_guided()
    else:
        trial.run()


class Trial:
    """So many messages at the decoders."""

    def __init__(self, laws, count: int, seed: int) -> None:
        self._laws = list(laws.items())
        self._count = count
        self._seed = seed
        self._done = 0
        self._taken: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._start = time.monotonic()
        self._warm_bytes = 0

    def run(self) -> None:
        """Mutates messages that are right, and those that were taken."""
        from fuzzing.mutations import mutated

        random = Random(self._seed)
        pools = [[*law.seeds] for _, law in self._laws]
        for number in range(self._count):
            place = number % len(self._laws)
            pool = pools[place]
            raw = mutated(random.choice(pool), random, random.choice(pools))
            is_taken = self._try(place, raw)
            if is_taken and len(raw) < LONGEST_KEPT and random.random() < 0.1:
                fixed = len(self._laws[place][1].seeds)
                if len(pool) < fixed + KEPT:
                    pool.append(raw)
                else:
                    pool[random.randrange(fixed, len(pool))] = raw
        self._end()

    def run_guided(self) -> None:
        """Has atheris choose what to mutate: the first byte names the decoder."""
        import atheris

        from fuzzing.mutations import mutated

        pools = [
            [bytes([place]) + raw for raw in law.seeds]
            for place, (_, law) in enumerate(self._laws)
        ]
        others = [seed[1:] for pool in pools for seed in pool]

        def test(data: bytes) -> None:
            if data:
                self._try(data[0] % len(self._laws), data[1:])
            if self._done >= self._count:
                self._end()

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            random = Random(seed)
            if not data or len(data) > LONGEST_KEPT or random.random() < 0.2:
                data = random.choice(random.choice(pools))
            return (data[:1] + mutated(data[1:], random, others))[:max_size]

        runs = [f"-seed={self._seed}", "-runs=-1", "-max_len=65536", "-verbosity=0"]
        atheris.Setup(["fuzzing", *runs], test, custom_mutator=mutate)
        atheris.Fuzz()

    def _try(self, place: int, raw: bytes) -> bool:
        name, law = self._laws[place]
        self._done += 1
        try:
            is_taken = law.holds(raw)
        except BaseException:
            print(f"{name}: {raw.hex()}\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        (self._taken if is_taken else self._refused)[name] += 1
        if self._done == self._count // 4:
            self._warm_bytes = resident_bytes()
        return is_taken

    def _end(self) -> None:
        told = {
            "taken": self._taken,
            "refused": self._refused,
            "grown_bytes": resident_bytes() - self._warm_bytes,
            "seconds": round(time.monotonic() - self._start, 1),
        }
        print(json.dumps(told), flush=True)
        os._exit(0)  # atheris has no other way to end well.


def resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
