"""The same functions, for servers that compute waiting points together.

A server learns at its start, of the calls that a function is warmed up for, whether
many points at once are faster than one by one.
"""

from benchmarks.fast_path import functions
from benchmarks.fast_path.coalescing import MOST_POINTS, SIZES
from jacserve_server import Registry, WarmUp

registry = Registry()
for name, n in SIZES.items():
    warm_up = WarmUp({"n": n}, batch=MOST_POINTS, quantities=["jacobian"])
    registry.function(warm_up=[warm_up])(getattr(functions, name))
