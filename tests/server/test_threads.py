"""Where no thread can be started calls fail, and nothing but these."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve_server import Registry, serving


@contextmanager
def no_thread(name: str) -> Iterator[None]:
    """Has no thread of such a name start."""
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if name in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        yield


def registry_of_one() -> Registry:
    registry = Registry()

    @registry.function
    def grow(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return jax.lax.while_loop(lambda y: y[0] < 9.0, lambda y: 2.0 * y, x)

    return registry


@pytest.mark.parametrize("name", ["compile", "device"])
def test_what_has_no_thread_fails_and_the_next_call_is_answered(name: str) -> None:
    settings = {"compile_threads": 1, "device_threads": 1}
    with serving(registry_of_one(), **settings) as server:
        with jacserve.Client(server.target, timeout_s=20) as client:
            for _ in range(3):
                with no_thread(name), pytest.raises(jacserve.CapacityError) as caught:
                    client.value("grow", np.ones(3))
                assert caught.value.reason == "DEVICE_OUT_OF_MEMORY"
            assert client.value("grow", np.ones(3)).tolist() == [16.0] * 3
            [device] = client.status().devices
            assert device.running_count == 0


def test_threads_that_there_are_do_what_another_could_not_be_started_for() -> None:
    with serving(registry_of_one(), device_threads=2) as server:
        with jacserve.Client(server.target, timeout_s=20) as client:
            client.value("grow", np.ones(3))
            with no_thread("device"), client.session() as session:
                asked = [session.submit("grow", np.ones(3)) for _ in range(50)]
                for each in asked:
                    assert each.result(20).value.tolist() == [16.0] * 3


def test_scrapes_without_threads_do_not_use_up_their_places() -> None:
    with serving(registry_of_one(), metrics_port=0) as server:
        with no_thread("process_request_thread"):
            for _ in range(10):
                with pytest.raises((ConnectionError, urllib.error.URLError)):
                    urllib.request.urlopen(server.metrics_url, timeout=10)
        with urllib.request.urlopen(server.metrics_url, timeout=30) as answer:
            assert answer.status == 200
