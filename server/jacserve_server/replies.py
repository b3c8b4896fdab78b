"""Outcomes in, serialized results out.

What all results of a program have in common is serialized once; a reply is that, the
circumstances of this run, and the numbers.
"""

from collections.abc import Hashable, Iterator

from jacserve import streaming
from jacserve.framing import Frame
from jacserve.tensors import buffer_of
from jacserve_server.messages import encode_circumstances, encode_outcome
from jacserve_server.query import Query
from jacserve_server.work import Outcome

_MOST_FRAMES = 1000


class ReplyWriter:
    """Writes results."""

    def __init__(self) -> None:
        """Has written nothing yet."""
        self._frames: dict[Hashable, tuple[Frame, list[int]]] = {}

    def write(self, outcome: Outcome, query: Query) -> bytes:
        """Writes a result as one message.

        Args:
            outcome: What came of the query.
            query: The query.

        Returns:
            A serialized Result.
        """
        circumstances = encode_circumstances(outcome)
        if outcome.outline.patterns:
            whole = encode_outcome(outcome, query)
            return Frame(whole.message).filled(whole.payloads, circumstances)
        # Of the shapes only the number of rows is not the program's.
        kind = (outcome.outline, query.quantities, outcome.finite.shape)
        known = self._frames.get(kind)
        if known is None:
            frame = Frame(encode_outcome(outcome, query).message)
            order = [
                place
                for asked in query.quantities
                for place, (quantity, _) in enumerate(outcome.outline.arrays)
                if quantity == asked and outcome.arrays[place].size
            ]
            if len(self._frames) >= _MOST_FRAMES:
                self._frames = {}
            known = self._frames[kind] = frame, order
        frame, order = known
        payloads = [buffer_of(outcome.arrays[place]) for place in order]
        return frame.filled(payloads, circumstances)

    def write_parts(self, outcome: Outcome, query: Query) -> Iterator[bytes]:
        """Writes a result of any size.

        Args:
            outcome: What came of the query.
            query: The query.

        Yields:
            Serialized EvaluateStreamResponses.
        """
        whole = encode_outcome(outcome, query)
        whole.message.MergeFromString(encode_circumstances(outcome))
        yield from streaming.parts(whole.message, whole.payloads)
