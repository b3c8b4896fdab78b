"""How much may be in flight, of all clients together and of each.

A client may take one more place only while it has fewer than are left, so that one
alone gets half of them, and who comes next always finds room.

Source: the dynamic threshold, with alpha = 1, of Choudhury and Hahne, Dynamic Queue
Length Thresholds for Shared-Memory Packet Switches (1998).
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from jacserve_server.errors import ServiceError

_RETRY_AFTER_S = 0.1


def shutting_down() -> ServiceError:
    """Makes the error of those who come, or stay, too late."""
    return ServiceError(
        "SHUTTING_DOWN",
        "the server is shutting down. Try again, or another server.",
        retry_after_s=_RETRY_AFTER_S,
    )


@dataclass(frozen=True, slots=True)
class InFlight:
    """What is in flight, of all clients or of one.

    Attributes:
        queries: Queries that have no answer yet.
        size_bytes: Their bytes.
    """

    queries: int
    size_bytes: int


class Ticket:
    """A query's place among those in flight, held from its arrival to its answer.

    Attributes:
        client: Whose it is.
        size_bytes: What it counts for.
    """

    __slots__ = ("_admission", "client", "size_bytes")

    def __init__(self, admission: "Admission", client: str, size_bytes: int) -> None:
        """Takes no place yet: entering it does."""
        self._admission = admission
        self.client = client
        self.size_bytes = size_bytes

    def __enter__(self) -> "Ticket":
        """Takes a place; raises ServiceError where there is none."""
        self._admission.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the place back."""
        self._admission.leave(self)

    def grow(self, size_bytes: int) -> None:
        """Counts for more from now on, such as for a result that will be large.

        Args:
            size_bytes: How many bytes more.

        Raises:
            ServiceError: So many are not left.
        """
        self._admission.grow(self, size_bytes)

    def shrink(self, size_bytes: int) -> None:
        """Counts for less from now on, as where what it grew for has failed.

        Args:
            size_bytes: How many bytes less; some that it has grown by.
        """
        self._admission.shrink(self, size_bytes)


class _Share:
    """What one client has in flight."""

    __slots__ = ("queries", "size_bytes")

    def __init__(self) -> None:
        self.queries = 0
        self.size_bytes = 0


class Admission:
    """Counts what is in flight. Used from one event loop.

    Attributes:
        queries: How many queries are in flight.
    """

    def __init__(
        self,
        *,
        max_queries: int,
        max_bytes: int,
        max_client_queries: int | None = None,
        max_client_bytes: int | None = None,
    ) -> None:
        """Starts with nothing in flight.

        Args:
            max_queries: The most queries in flight.
            max_bytes: The most bytes in flight; one query alone always fits.
            max_client_queries: The most queries in flight of one client; None for
                its part of them alone.
            max_client_bytes: The most bytes in flight of one client, likewise; the
                only query of a client always fits.
        """
        self._max_client_queries = max_client_queries
        self._max_client_bytes = max_client_bytes
        self.queries = 0
        self._on_leave: Callable[[], None] | None = None
        self._max_queries = max_queries
        self._max_bytes = max_bytes
        self._size_bytes = 0
        # Those that have something in flight, so that it does not grow for ever.
        self._shares: dict[str, _Share] = {}

    @property
    def in_flight(self) -> InFlight:
        """What is in flight, of all clients."""
        return InFlight(self.queries, self._size_bytes)

    @property
    def most(self) -> InFlight:
        """What may be in flight."""
        return InFlight(self._max_queries, self._max_bytes)

    @property
    def shares(self) -> dict[str, InFlight]:
        """What is in flight, by client."""
        return {
            client: InFlight(share.queries, share.size_bytes)
            for client, share in self._shares.items()
        }

    @property
    def is_closed(self) -> bool:
        """Whether no more are admitted."""
        return self._on_leave is not None

    def close(self, on_leave: Callable[[], None]) -> None:
        """Admits no more.

        Args:
            on_leave: Called whenever a query that is in flight has left.
        """
        self._on_leave = on_leave

    def enter(self, ticket: Ticket) -> None:
        """Admits a query.

        Args:
            ticket: Its ticket.

        Raises:
            ServiceError: There is no room, or the server is shutting down.
        """
        if self._on_leave is not None:
            raise shutting_down()
        share = self._shares.get(ticket.client)
        if self.queries:
            room = self._max_queries - self.queries
            self._check_room(room, ticket.size_bytes)
            if share is not None:
                self._check_share(share, room)
                self._check_client(share, 1, ticket.size_bytes)
        if share is None:
            share = self._shares[ticket.client] = _Share()
        share.queries += 1
        share.size_bytes += ticket.size_bytes
        self.queries += 1
        self._size_bytes += ticket.size_bytes

    def leave(self, ticket: Ticket) -> None:
        """Frees a query's place."""
        share = self._shares[ticket.client]
        share.queries -= 1
        share.size_bytes -= ticket.size_bytes
        if not share.queries:
            del self._shares[ticket.client]
        self.queries -= 1
        self._size_bytes -= ticket.size_bytes
        if self._on_leave is not None:
            self._on_leave()

    def grow(self, ticket: Ticket, size_bytes: int) -> None:
        """Counts more bytes for a query in flight.

        Args:
            ticket: Its ticket.
            size_bytes: How many bytes more.

        Raises:
            ServiceError: So many are not left, and others have the rest.
        """
        share = self._shares[ticket.client]
        if self.queries > 1:
            self._check_room(1, size_bytes)
            if share.queries > 1:
                self._check_client(share, 0, size_bytes)
        ticket.size_bytes += size_bytes
        share.size_bytes += size_bytes
        self._size_bytes += size_bytes

    def shrink(self, ticket: Ticket, size_bytes: int) -> None:
        """Counts fewer bytes for a query in flight.

        Args:
            ticket: Its ticket.
            size_bytes: How many bytes fewer.
        """
        ticket.size_bytes -= size_bytes
        self._shares[ticket.client].size_bytes -= size_bytes
        self._size_bytes -= size_bytes

    def _check_room(self, room: int, size_bytes: int) -> None:
        if room <= 0 or self._size_bytes + size_bytes > self._max_bytes:
            raise self._full(
                f"{self.queries} queries of {self._size_bytes} bytes are in flight, "
                f"and this server takes {self._max_queries} of {self._max_bytes}, so "
                f"that one more of {size_bytes} bytes has no room. "
            )

    def _check_share(self, share: _Share, room: int) -> None:
        bytes_left = self._max_bytes - self._size_bytes
        if share.queries >= room or share.size_bytes >= bytes_left:
            raise self._full(
                f"{share.queries} queries of {share.size_bytes} bytes of this client "
                f"are in flight, and it may have no more than are left for others: "
                f"{room} of {self._max_queries} queries, {bytes_left} of "
                f"{self._max_bytes} bytes. "
            )

    def _check_client(self, share: _Share, queries: int, size_bytes: int) -> None:
        most, most_bytes = self._max_client_queries, self._max_client_bytes
        if most is not None and share.queries + queries > most:
            raise self._full(
                f"{share.queries} queries of this client are in flight, and this "
                f"server takes {most} of each. "
            )
        if most_bytes is not None and share.size_bytes + size_bytes > most_bytes:
            raise self._full(
                f"{share.size_bytes} bytes of this client are in flight, and this "
                f"server takes {most_bytes} of each, so that {size_bytes} more have "
                "no room. "
            )

    def _full(self, problem: str) -> ServiceError:
        return ServiceError(
            "QUEUE_FULL",
            f"{problem}Wait for answers before asking more, try again in "
            f"{_RETRY_AFTER_S} s, or send points in batches.",
            retry_after_s=_RETRY_AFTER_S,
            queries=self.queries,
            max_queries=self._max_queries,
            bytes=self._size_bytes,
            max_bytes=self._max_bytes,
        )
