"""Serves the Jacobians of registered JAX functions over gRPC.

Needs the extra: `pip install "jacserve[server]"`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jacserve_server.registry import RegistrationError, Registry, WarmUp

if TYPE_CHECKING:
    from jacserve_server.config import Config
    from jacserve_server.running import RunningServer, serving

__all__ = [
    "Config",
    "RegistrationError",
    "Registry",
    "RunningServer",
    "WarmUp",
    "serving",
]

_LAZY = {
    "Config": "jacserve_server.config",
    "RunningServer": "jacserve_server.running",
    "serving": "jacserve_server.running",
}


def __getattr__(name: str) -> Any:
    # A file of functions needs the registry only: it imports at once, and the rest
    # of the server when it is asked for.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
