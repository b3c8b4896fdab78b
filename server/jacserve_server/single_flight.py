"""A cache whose entries are made once, however many ask meanwhile."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor as Pool, Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Entry(Generic[V]):
    """An entry that is made, or being made."""

    def __init__(self, making: "Future[V]") -> None:
        self.making = making
        self.made = asyncio.wrap_future(making)
        self.waiters = 0


class SingleFlight(Generic[K, V]):
    """Makes entries in a pool and keeps the most recently used.

    Used from one event loop. Whoever stops waiting leaves the making to the others
    and to the next who asks; but what nobody waits for any more is not begun. What
    fails is not kept.
    """

    def __init__(self, pool: Pool, *, capacity: int) -> None:
        """Starts empty.

        Args:
            pool: Where entries are made.
            capacity: The most entries kept; the least recently used goes first.
        """
        self._pool = pool
        self._capacity = capacity
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()

    def has(self, key: K) -> bool:
        """Tells whether an entry is made, or being made."""
        return key in self._entries

    def is_made(self, key: K) -> bool:
        """Tells whether an entry is made."""
        entry = self._entries.get(key)
        return entry is not None and entry.made.done()

    def ready(self, key: K) -> V | None:
        """Returns an entry that is made already, else None."""
        entry = self._entries.get(key)
        if entry is None or not entry.made.done():
            return None
        self._entries.move_to_end(key)
        return entry.made.result()

    async def get(self, key: K, make: Callable[[], V]) -> V:
        """Returns an entry, made if need be.

        Args:
            key: Which entry.
            make: Makes it; runs in the pool.

        Returns:
            The entry.

        Raises:
            Exception: Whatever `make` raises, to all who wait for it.
        """
        entry = self._entries.get(key) or self._begun(key, make)
        self._entries.move_to_end(key)
        entry.waiters += 1
        try:
            return await asyncio.shield(entry.made)
        finally:
            entry.waiters -= 1
            if not entry.waiters and entry.making.cancel():
                self._drop(key, entry)

    def begin(self, key: K, make: Callable[[], V], on_made: Callable[[], None]) -> None:
        """Has an entry made that nobody waits for.

        Args:
            key: Which entry; one that is not there.
            make: Makes it; runs in the pool.
            on_made: Called once it is made, in the event loop.
        """
        self._begun(key, make).made.add_done_callback(lambda _: on_made())

    def _begun(self, key: K, make: Callable[[], V]) -> _Entry[V]:
        entry = self._entries[key] = _Entry(self._pool.submit(make))
        entry.made.add_done_callback(lambda _: self._settle(key, entry))
        return entry

    def _settle(self, key: K, entry: _Entry[V]) -> None:
        if entry.made.cancelled() or entry.made.exception() is not None:
            self._drop(key, entry)
        made = [old for old, other in self._entries.items() if other.made.done()]
        for old in made[: max(0, len(self._entries) - self._capacity)]:
            del self._entries[old]

    def _drop(self, key: K, entry: _Entry[V]) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
