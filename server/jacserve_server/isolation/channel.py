"""Messages and descriptors through a socket pair, between a server and its worker.

A message is the length of its head and of its tail, then both. Whoever receives keeps
no more than a message may have, and takes descriptors only if it says so.
"""

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

_LENGTHS = struct.Struct("<IQ")
_MOST_HEAD_BYTES = 2**24
_READ_BYTES = 2**18
# Of one message; a run brings one region.
_MOST_DESCRIPTORS = 8


class ChannelError(Exception):
    """What came was no message; the text says why."""


class Channel:
    """One end of a socket pair. Used from one event loop.

    Attributes:
        descriptors: Those received, the first first.
        lost_last: Whether the other end was closed before it had read the last message.
    """

    def __init__(
        self,
        end: socket.socket,
        *,
        on_message: Callable[[bytes, bytes], None],
        on_closed: Callable[[Exception | None], None],
        max_tail_bytes: int,
        takes_descriptors: bool = False,
    ) -> None:
        """Begins to receive.

        Args:
            end: The socket, which is the channel's from now on.
            on_message: Called with head and tail of each message. What it raises
                closes the channel.
            on_closed: Called once, when the other end is closed, or with what was
                wrong with what it sent.
            max_tail_bytes: The most bytes of a tail received.
            takes_descriptors: Whether descriptors are received, into `descriptors`.
        """
        self.descriptors: deque[int] = deque()
        self.lost_last = False
        self._end = end
        self._on_message = on_message
        self._on_closed = on_closed
        self._max_tail_bytes = max_tail_bytes
        self._takes_descriptors = takes_descriptors
        self._received = bytearray()
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        end.setblocking(False)
        self._loop.add_reader(end.fileno(), self.receive)

    def send(
        self, head: bytes, tail: bytes = b"", descriptors: Sequence[int] = ()
    ) -> None:
        """Sends a message, now or when the other end has taken what came before.

        Args:
            head: Its head.
            tail: Its tail.
            descriptors: What goes with it; may be closed once this returns only if
                the other end has answered.
        """
        if self._end.fileno() < 0:
            return
        data = b"".join((_LENGTHS.pack(len(head), len(tail)), head, tail))
        self._unsent.append((memoryview(data), descriptors))
        if len(self._unsent) == 1:
            self._flush()
            if self._unsent:
                self._loop.add_writer(self._end.fileno(), self._flush_later)

    def receive(self) -> bool:
        """Takes something of what has come, which the event loop also does by itself.

        Returns:
            Whether there may be more.
        """
        if self._end.fileno() < 0:
            return False
        try:
            data = self._read()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            # It closed before it had read everything.
            self.lost_last, data = True, b""
        if not data:
            self._fail(None)
            return False
        self._received += data
        try:
            self._deliver()
        except Exception as error:
            self._fail(error)
        return True

    def close(self) -> None:
        """Sends and receives no more."""
        if self._end.fileno() < 0:
            return
        self._loop.remove_reader(self._end.fileno())
        self._loop.remove_writer(self._end.fileno())
        self._end.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())

    def _read(self) -> bytes:
        if not self._takes_descriptors:
            # The kernel closes any that would have come.
            return self._end.recv(_READ_BYTES)
        data, descriptors, _, _ = socket.recv_fds(
            self._end, _READ_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        self.descriptors.extend(descriptors)
        return data

    def _deliver(self) -> None:
        while len(self._received) >= _LENGTHS.size:
            head_bytes, tail_bytes = _LENGTHS.unpack_from(self._received)
            if head_bytes > _MOST_HEAD_BYTES or tail_bytes > self._max_tail_bytes:
                raise ChannelError(
                    f"a message has {head_bytes} and {tail_bytes} bytes, and at most "
                    f"{_MOST_HEAD_BYTES} and {self._max_tail_bytes} are taken"
                )
            middle = _LENGTHS.size + head_bytes
            end = middle + tail_bytes
            if len(self._received) < end:
                return
            with memoryview(self._received) as received:
                head = bytes(received[_LENGTHS.size : middle])
                tail = bytes(received[middle:end])
            del self._received[:end]
            self._on_message(head, tail)
            if self._end.fileno() < 0:
                return

    def _fail(self, error: Exception | None) -> None:
        if self._end.fileno() < 0:
            return
        self.close()
        self._on_closed(error)

    def _flush_later(self) -> None:
        self._flush()
        if not self._unsent and self._end.fileno() >= 0:
            self._loop.remove_writer(self._end.fileno())

    def _flush(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self._end, [data], list(descriptors))
                else:
                    sent = self._end.send(data)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                # The other end is closed: `receive` will find out.
                self.lost_last = True
                self._unsent.clear()
                return
            self._unsent.popleft()
            if sent < len(data):
                self._unsent.appendleft((data[sent:], ()))


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Returns both ends of a new channel; nothing inherits them by accident."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
