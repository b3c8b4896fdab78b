"""A cache whose entries are made once, however many ask meanwhile."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Entry(Generic[V]):
    """An entry that is made, or being made."""

    def __init__(self, making: "Future[V]", owner: str) -> None:
        self.making = making
        self.owner = owner
        self.made = asyncio.wrap_future(making)
        self.waiters = 0


class SingleFlight(Generic[K, V]):
    """Makes entries in a pool and keeps the most recently used.

    Used from one event loop. Whoever stops waiting leaves the making to the others
    and to the next who asks; but what nobody waits for any more is not begun. What
    fails is not kept. An entry belongs to who has first asked for it, and whoever has
    the most is the first to lose one: so nobody can drive out all that others have.
    """

    def __init__(
        self,
        submit: Callable[[str, Callable[[], V]], "Future[V]"],
        *,
        capacity: int,
        share: int | None = None,
        is_owners_alone: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        """Starts empty.

        Args:
            submit: Has an entry made for somebody, in another thread.
            capacity: The most entries kept when they are made. One that belongs to
                nobody, "", goes last; of one owner the least recently used goes first.
            share: The most that are kept of one owner; None for any.
            is_owners_alone: Tells whether an entry could not be made for its owner
                only; then others who wait ask for it themselves.
        """
        self._submit = submit
        self._is_owners_alone = is_owners_alone
        self._capacity = capacity
        self._share = share
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()

    def __len__(self) -> int:
        """Returns how many entries are made, or being made."""
        return len(self._entries)

    def has(self, key: K) -> bool:
        """Tells whether an entry is made, or being made."""
        return key in self._entries

    def ready(self, key: K) -> V | None:
        """Returns an entry that is made already, else None."""
        entry = self._entries.get(key)
        if entry is None or not entry.made.done():
            return None
        self._entries.move_to_end(key)
        return entry.made.result()

    async def get(self, key: K, make: Callable[[], V], owner: str = "") -> V:
        """Returns an entry, made if need be.

        Args:
            key: Which entry.
            make: Makes it; runs in another thread.
            owner: Who asks; "" for the server itself.

        Returns:
            The entry.

        Raises:
            Exception: Whatever `make` raises, to all who wait for it.
        """
        while True:
            entry = self._entries.get(key) or self._begun(key, make, owner)
            self._entries.move_to_end(key)
            entry.waiters += 1
            try:
                return await asyncio.shield(entry.made)
            except Exception as error:
                if entry.owner == owner or not self._is_owners_alone(error):
                    raise
            finally:
                entry.waiters -= 1
                if not entry.waiters and entry.making.cancel():
                    self._drop(key, entry)

    def begin(
        self,
        key: K,
        make: Callable[[], V],
        on_made: Callable[[], None],
        owner: str,
    ) -> None:
        """Has an entry made that nobody waits for.

        Args:
            key: Which entry; one that is not there.
            make: Makes it; runs in another thread.
            on_made: Called once it is made, in the event loop; not if it fails.
            owner: Whose it is; "" for the server itself.
        """

        def tell(made: "asyncio.Future[V]") -> None:
            if not made.cancelled() and made.exception() is None:
                on_made()

        self._begun(key, make, owner).made.add_done_callback(tell)

    def _begun(self, key: K, make: Callable[[], V], owner: str) -> _Entry[V]:
        entry = self._entries[key] = _Entry(self._submit(owner, make), owner)
        entry.made.add_done_callback(lambda _: self._settle(key, entry))
        return entry

    def _settle(self, key: K, entry: _Entry[V]) -> None:
        if entry.made.cancelled() or entry.made.exception() is not None:
            self._drop(key, entry)
        while (owner := self._greediest()) is not None:
            del self._entries[self._oldest(owner)]

    def _greediest(self) -> str | None:
        """Returns who has to lose an entry; None if nobody has."""
        made = Counter(e.owner for e in self._entries.values() if e.made.done())
        strangers = [owner for owner in made if owner]
        most = max(strangers, key=made.__getitem__, default="")
        if most and self._share is not None and made[most] > self._share:
            return most
        # What is yet to be made drives out nothing, however much of it waits.
        return most if made.total() > self._capacity else None

    def _oldest(self, owner: str) -> K:
        entries = self._entries.items()
        return next(k for k, e in entries if e.owner == owner and e.made.done())

    def _drop(self, key: K, entry: _Entry[V]) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
