"""A server that answers anything, whatever it is asked."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Any

import grpc

from fuzzing import seeds
from fuzzing.mutations import mutated
from fuzzing.wire import BYTES, WireField, unpacked

_PIECES = ("EvaluateStream", "ReadJobResult")


def answers() -> Mapping[str, Sequence[bytes]]:
    """Answers of each RPC that would be right."""
    jobs = seeds.job_infos()
    return {
        "ListFunctions": [
            WireField(1, BYTES, each).encoded() for each in seeds.functions()
        ],
        "GetFunction": seeds.functions(),
        "GetSparsity": seeds.sparsities(),
        "Evaluate": seeds.results(),
        "EvaluateStream": seeds.result_streams(),
        "Session": seeds.session_responses(),
        "GetJob": jobs,
        "ListJobs": [WireField(1, BYTES, each).encoded() for each in jobs],
        "CancelJob": jobs,
        "CreateJob": jobs,
        "WatchJob": [WireField(1, BYTES, each).encoded() for each in jobs],
        "ReadJobResult": seeds.result_streams(),
    }


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._answers = answers()
        self._others = [each for pool in self._answers.values() for each in pool]

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rpartition("/")[2]

        def answer(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            random = self._random
            if random.random() < 0.1:
                details = mutated(seeds.statuses()[0], random, self._others)
                context.set_trailing_metadata((("grpc-status-details-bin", details),))
                context.set_code(random.choice(list(grpc.StatusCode)[1:]))
                return
            if method == "Session":
                for raw in requests:
                    yield raw[:9] + self._drawn(method)[9:]
            elif method in _PIECES:
                yield from unpacked(self._drawn(method))
            else:
                yield self._drawn(method)

        return grpc.stream_stream_rpc_method_handler(answer)

    def _drawn(self, method: str) -> bytes:
        raw = self._random.choice(self._answers[method])
        if self._random.random() < 0.1:
            return raw
        return mutated(raw, self._random, self._others)


@contextmanager
def mad_server(seed: int) -> Generator[str]:
    """Runs one; yields its address."""
    server = grpc.server(ThreadPoolExecutor(8), handlers=[_Handlers(seed)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
