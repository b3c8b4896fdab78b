"""A queue in which clients take turns, however much each has in it."""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Keeps what waits for each client: round robin among clients, FIFO within one.

    To put, to take and to remove take the same time however much waits.
    """

    def __init__(self) -> None:
        """Starts empty."""
        # The client whose turn it is stands first; none stands here without an item.
        self._clients: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        """Returns how many items wait."""
        return self._length

    def put(self, client: str, item: T, *, is_first: bool = False) -> None:
        """Adds an item.

        Args:
            client: Whose it is. One that had nothing here gets its turn last.
            item: The item.
            is_first: Whether it goes before, not behind, what its client has here.
        """
        items = self._clients.setdefault(client, OrderedDict())
        items[item] = None
        items.move_to_end(item, last=not is_first)
        self._length += 1

    def heads(self) -> Iterator[T]:
        """Yields the next item of each client, in the order of their turns."""
        for items in self._clients.values():
            yield next(iter(items))

    def rounds(self) -> Iterator[T]:
        """Yields all items in the order of turns; each round has one of each client."""
        left = deque(map(iter, self._clients.values()))
        while left:
            items = left.popleft()
            try:
                yield next(items)
            except StopIteration:
                continue
            left.append(items)

    def take(self, client: str, item: T) -> None:
        """Removes an item that gets its turn: its client's next one comes last."""
        self.remove(client, item)
        if client in self._clients:
            self._clients.move_to_end(client)

    def remove(self, client: str, item: T) -> None:
        """Removes an item that waits no more; the order of turns stays."""
        items = self._clients[client]
        del items[item]
        self._length -= 1
        if not items:
            del self._clients[client]
