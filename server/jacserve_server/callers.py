"""Who calls, and what they may do: plain data that goes with a call."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["read", "compute", "jobs", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        identity: "token:NAME" or "cert:NAME"; "" where nobody has to say who they are.
        scopes: What they may do.
        peer: The connection's address.
        token_id: Which token they came with; "" where there is none.
        until: When their certificate ends, in seconds since 1970.
    """

    identity: str
    scopes: frozenset[Scope]
    peer: str
    token_id: str = ""
    until: float = math.inf

    @property
    def client(self) -> str:
        """Whose turn it is and whose share it counts for."""
        return self.identity or self.peer


@dataclass(slots=True, eq=False)
class Call:
    """One call, or one query of a session.

    Attributes:
        method: The RPC's name.
        caller: Who calls.
        request_id: Finds the call in the log.
        start: When it came, by `time.perf_counter`.
        is_query: Whether it is a query of a session.
        function: Name and version of what it is about, once that is known.
        queue_s: Seconds that it waited for a device; 0 where it did not.
        compile_s: Seconds that it waited for its program.
        execute_s: Seconds of running it.
    """

    method: str
    caller: Caller
    request_id: str
    start: float
    is_query: bool = False
    function: str = ""
    queue_s: float = 0.0
    compile_s: float = 0.0
    execute_s: float = 0.0

    @property
    def client(self) -> str:
        """Whose turn it is and whose share it counts for."""
        return self.caller.client
