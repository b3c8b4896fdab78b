"""Processes that send bytes without jacserve: the floors of a large answer.

Run as `python -m benchmarks.fast_path.floors protobuf` or `... socket`. Like a server,
both begin with an array in memory. `protobuf` answers Evaluate with one message of the
generated classes, serialized by themselves: what a service does that takes no care.
`socket` writes the same bytes to a TCP connection, and nothing else.
"""

import socket
import sys
from typing import Any

import grpc.aio
import numpy as np
import uvloop

from jacserve.v1 import jacobian_pb2 as pb

MOST_BYTES = 2**28
_REQUEST_BYTES = 8


async def serve_protobuf(numbers: np.ndarray) -> None:
    """Serves until the process is ended; a function's name is the bytes wanted."""

    async def evaluate(request: pb.Query, context: Any) -> pb.Result:
        del context
        array = numbers[: int(request.function) // 4]
        result = pb.Result()
        tensor = result.outputs.add(quantity=pb.QUANTITY_JACOBIAN).tensor
        tensor.dtype = pb.DTYPE_FLOAT32
        tensor.shape.extend(array.shape)
        tensor.data = array.tobytes()
        return result

    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler = grpc.unary_unary_rpc_method_handler(
        evaluate, pb.Query.FromString, pb.Result.SerializeToString
    )
    service = pb.DESCRIPTOR.services_by_name["JacobianService"].full_name
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"Evaluate": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"Listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def serve_socket(numbers: np.ndarray) -> None:
    """Serves one connection until the peer closes it: a size in, as many bytes out."""
    data = numbers.data.cast("B")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"Listening on 127.0.0.1:{listening.getsockname()[1]}", flush=True)
        peer, _ = listening.accept()
        with peer:
            while request := peer.recv(_REQUEST_BYTES, socket.MSG_WAITALL):
                peer.sendall(data[: int.from_bytes(request, "little")])


class RawSocket:
    """The other end of `serve_socket`."""

    def __init__(self, address: str, most_bytes: int) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        # Written once, so that no page is touched for the first time later.
        self._buffer = memoryview(bytearray(b"\1" * most_bytes))

    def receive(self, size_bytes: int) -> None:
        """Asks for bytes, and reads them into a buffer that is there already."""
        self._socket.sendall(size_bytes.to_bytes(_REQUEST_BYTES, "little"))
        place = 0
        while place < size_bytes:
            place += self._socket.recv_into(self._buffer[place:size_bytes])

    def close(self) -> None:
        """Closes the connection, which ends the other process."""
        self._socket.close()


def main() -> None:
    """Serves."""
    numbers = np.random.default_rng(0).random(MOST_BYTES // 4, dtype="f4")
    if sys.argv[1:] == ["socket"]:
        serve_socket(numbers)
    else:
        uvloop.run(serve_protobuf(numbers))


if __name__ == "__main__":
    main()
