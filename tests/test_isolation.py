"""Functions that end what runs them, over the wire, in worker processes."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import jacserve
import nasty_functions
import zoo
from guarded import Tokens
from jacserve.errors import JacobianError
from jacserve.vocabulary import Quantity
from jacserve_server import Registry, RunningServer, serving
from jacserve_server.registry import RegistrationError
from job_calls import FAILED, JobCalls, points, reason_of
from job_servers import JobHome
from server_process import server_process

FUNCTIONS = Path(nasty_functions.__file__)
SERVING = health_pb2.HealthCheckResponse.SERVING
GOOD = np.array([0.25, 0.5, 0.75])
BAD = -GOOD
EXECUTE_S, COMPILE_S = 2.0, 15.0
# What a call may take that a worker's end holds up: a new one is started, on a machine
# that may do much else.
SOON_S = 40.0


def until(is_so: Callable[[], object], seconds: float = SOON_S) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found.update(map(int, task.read_text().split()))
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def isolated(*registries: Registry, **settings: object):
    defaults = {
        "isolation": "process", "max_execute_s": EXECUTE_S, "max_compile_s": COMPILE_S,
    }  # fmt: skip
    return serving(*registries, **{**defaults, **settings})


@pytest.fixture(scope="module")
def client() -> Iterator[jacserve.Client]:
    """A client of a server that isolates all functions; each test spoils its own."""
    with isolated(nasty_functions.registry) as server:
        with jacserve.Client(server.target) as connected:
            yield connected


def failure(call: Callable[[], object]) -> JacobianError:
    with pytest.raises(JacobianError) as caught:
        call()
    return caught.value


def worker_of(client: jacserve.Client, name: str = "pid") -> int:
    return int(client.value(name, 1.0))


def test_what_ends_its_process_fails_alone_and_is_quarantined_at_the_second_time(
    client: jacserve.Client,
) -> None:
    expected = client.jacobian("gentle", GOOD)
    before = worker_of(client)
    assert before != os.getpid()
    with ThreadPoolExecutor(8) as pool:
        stop = threading.Event()

        def ask() -> list[np.ndarray]:
            found = []
            while not stop.is_set():
                found.append(client.jacobian("gentle", GOOD, timeout_s=SOON_S))
            return found

        asking = [pool.submit(ask) for _ in range(4)]
        first = failure(lambda: client.value("segfault", BAD))
        assert client.describe("segfault").quarantine_reason == ""
        second = failure(lambda: client.value("segfault", BAD))
        stop.set()
        answers = [each for asked in asking for each in asked.result()]
    assert first.reason == second.reason == "WORKER_DIED"
    assert "which was killed by SIGSEGV" in str(first)
    assert worker_of(client) != before
    assert len(answers) > 4
    for each in answers:
        np.testing.assert_array_equal(each, expected)
    refused = failure(lambda: client.value("segfault", GOOD))
    assert refused.reason == "FUNCTION_QUARANTINED"
    info = client.describe("segfault")
    assert "2 times: its process was killed by SIGSEGV at 2" in info.quarantine_reason
    assert info.quarantine_reason in str(refused)
    assert info.isolation == "process"
    assert client.describe("gentle").quarantine_reason == ""


@pytest.mark.slow
def test_an_administrator_sees_what_died_and_releases_it(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    users, admins = tokens.make("u", "read", "compute"), tokens.make("a", "admin")
    settings = {"tokens_file": tokens.path, "metrics_port": 0}

    def metric(line: str) -> bool:
        with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
            return f"\n{line}\n" in response.read().decode()

    quarantined = 'jacserve_quarantined{function="mortal@1"} 1.0'
    with (
        isolated(nasty_functions.mortal, **settings) as server,
        jacserve.Client(server.target, token=users, timeout_s=SOON_S) as user,
        jacserve.Client(server.target, token=admins) as admin,
    ):
        [first] = admin.status().workers
        assert (first.start_count, first.last_failure) == (1, "")
        assert is_running(first.process_id or 0)
        for _ in range(2):
            assert failure(lambda: user.value("mortal", BAD)).reason == "WORKER_DIED"
        until(lambda: admin.status().workers[0].process_id)
        [later] = admin.status().workers
        assert (later.device, later.start_count) == (first.device, 3)
        assert later.process_id != first.process_id
        assert later.last_failure == "mortal@1: its process was killed by SIGKILL"
        assert metric(quarantined)
        labels = f'cause="died",device="{first.device}"'
        assert metric(f"jacserve_worker_restarts_total{{{labels}}} 2.0")
        refused = failure(lambda: user.value("mortal", GOOD))
        assert refused.reason == "FUNCTION_QUARANTINED"
        # Neither who computes nor another's name releases it.
        assert failure(lambda: user.release("mortal")).reason == "SCOPE_MISSING"
        assert failure(lambda: admin.release("other")).reason == "FUNCTION_NOT_FOUND"
        admin.release("immortal")
        assert failure(lambda: user.value("mortal", GOOD)).reason == refused.reason
        assert admin.release("mortal").quarantine_reason == ""
        np.testing.assert_array_equal(user.value("mortal", GOOD), GOOD)
        assert not metric(quarantined)
        # It starts anew: one more death is the first.
        assert failure(lambda: user.value("mortal", BAD)).reason == "WORKER_DIED"
        np.testing.assert_array_equal(user.value("mortal", GOOD), GOOD)
        assert user.jacobian("immortal", GOOD).shape == (3, 3)


def test_what_does_not_end_is_ended_after_its_budget(client: jacserve.Client) -> None:
    expected = client.jacobian("gentle", GOOD)
    client.value("endless", GOOD)
    client.value("hasty", GOOD)
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        guilty = pool.submit(failure, lambda: client.value("endless", np.nan * GOOD))
        assert np.array_equal(client.jacobian("gentle", GOOD), expected)
        assert time.monotonic() - start < EXECUTE_S  # Beside it.
        error = guilty.result()
        assert EXECUTE_S <= time.monotonic() - start < EXECUTE_S + 5
    assert error.reason == "TIME_BUDGET_SPENT"
    assert isinstance(error, TimeoutError)
    assert "ran for 2.0 s, but may take 2 s" in str(error)
    np.testing.assert_array_equal(client.jacobian("gentle", GOOD), expected)
    assert time.monotonic() - start < EXECUTE_S + SOON_S
    own = failure(lambda: client.value("hasty", np.nan * GOOD))
    assert "may take 1 s" in str(own)


@pytest.mark.slow
def test_tracing_that_does_not_end_is_ended_too() -> None:
    with isolated(nasty_functions.registry, max_compile_s=10) as server:
        with jacserve.Client(server.target) as client, ThreadPoolExecutor(2) as pool:
            expected = client.value("untraceable", GOOD)
            points = np.ones(nasty_functions.ENDLESS)
            guilty = pool.submit(failure, lambda: client.value("untraceable", points))
            exiting = failure(lambda: client.value("exiting", points))
            assert exiting.reason == "TRACE_FAILED"
            error = guilty.result()
            assert error.reason == "TIME_BUDGET_SPENT"
            assert "was compiled for 10.0 s, but may take 10 s" in str(error)
            np.testing.assert_array_equal(client.value("untraceable", GOOD), expected)


@pytest.mark.slow
def test_what_a_worker_says_is_not_believed(client: jacserve.Client) -> None:
    client.value("gentle", GOOD)
    error = failure(lambda: client.value("mad", BAD))
    assert error.reason == "WORKER_DIED"
    assert "spoke nonsense: ChannelError" in str(error)
    np.testing.assert_array_equal(client.value("gentle", GOOD), np.sin(GOOD) * GOOD)


def test_ordinary_failures_cost_no_worker(client: jacserve.Client) -> None:
    before = worker_of(client)
    for name, words in (("hog", "MemoryError"), ("raising", "the pump is dry")):
        error = failure(lambda name=name: client.value(name, BAD))
        assert error.reason == "EXECUTION_FAILED"
        assert words in str(error)
    assert worker_of(client) == before


def test_no_memory_to_share_is_said_in_words_and_passes() -> None:
    with (
        server_process(FUNCTIONS, "--isolation", "process") as server,
        jacserve.Client(server.target, timeout_s=SOON_S) as client,
    ):
        client.value("large", np.ones(3))
        pid = server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        error = failure(lambda: client.value("large", np.ones(100_000)))
        assert error.reason == "DEVICE_OUT_OF_MEMORY"
        assert "of arrays with the process of functions/large@1: Too many" in str(error)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert client.value("large", np.ones(100_000))[-1] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leave", "suicide"])
def test_the_guilty_is_found_among_several(client: jacserve.Client, name: str) -> None:
    client.value(name, GOOD)
    client.value("asleep", GOOD)
    with ThreadPoolExecutor(2) as pool:
        # Without an end of its own it is over its budget, but at the second time only.
        other = pool.submit(failure, lambda: client.value("asleep", BAD))
        time.sleep(0.3)
        error = failure(lambda: client.value(name, BAD))
        assert error.reason == "WORKER_DIED"
        assert name in str(error)
        assert other.result().reason == "TIME_BUDGET_SPENT"


AGREEING = ("spherical",)
FEW: tuple[tuple[Quantity, ...], ...] = (("value", "jacobian"),)
LAYOUTS = ("matrix", "blocks")
QUANTITIES: tuple[tuple[Quantity, ...], ...] = (
    ("value", "jacobian"),
    ("value", "slogdet", "newton_step"),
    ("gradient", "hessian"),
    ("singular_values",),
)


def check_agreement(
    ours: jacserve.Client,
    theirs: jacserve.Client,
    animals: list[zoo.Animal],
    quantities: tuple[tuple[Quantity, ...], ...] = QUANTITIES,
    step: int = 1,
) -> int:
    """Compares every step-th answer bit for bit; returns how many there were."""
    count = 0
    random = np.random.default_rng(0)
    for animal in animals:
        single = animal.sample(random)
        rows = [animal.sample(random) for _ in range(3)]
        batch = tuple(map(np.stack, zip(*rows, strict=True)))
        ways = product((single, batch), animal.dtypes, quantities, LAYOUTS)
        for inputs, dtype, some, layout in islice(
            ways, len(animal.name) % step, None, step
        ):
            given = tuple(
                x.astype(dtype) if x.dtype.kind in "fc" else x
                for x in map(np.asarray, inputs)
            )
            count += check_answer(ours, theirs, animal.name, given, some, layout)
    return count


def check_answer(ours, theirs, name, inputs, quantities, layout) -> bool:
    def ask(client: jacserve.Client):
        try:
            return client.evaluate(name, inputs, quantities=quantities, layout=layout)
        except JacobianError as error:
            return str(error)

    expected, found = ask(ours), ask(theirs)
    if isinstance(expected, str):
        assert found == expected
        return False
    assert not isinstance(found, str), found
    for quantity in quantities:
        ours_, theirs_ = getattr(expected, quantity), getattr(found, quantity)
        for one, other in zip(leaves(ours_), leaves(theirs_), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert (found.mode, found.device, found.bucket, found.finite) == (
        expected.mode, expected.device, expected.bucket, expected.finite,
    )  # fmt: skip
    return True


def leaves(tree: object) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for each in tree.values() for leaf in leaves(each)]
    if isinstance(tree, tuple | list):
        return [leaf for each in tree for leaf in leaves(each)]
    return [np.asarray(tree)]


def test_answers_are_those_of_the_server_itself(server: RunningServer) -> None:
    animals = [each for each in zoo.ZOO if each.name in AGREEING]
    with isolated(zoo.registry, max_execute_s=60) as running:
        with jacserve.Client(running.target) as theirs:
            with jacserve.Client(server.target) as ours:
                assert check_agreement(ours, theirs, animals, FEW) == 8


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_answers_are_those_of_the_server_itself(server: RunningServer) -> None:
    with isolated(zoo.registry, max_execute_s=60) as running:
        with jacserve.Client(running.target) as theirs:
            with jacserve.Client(server.target) as ours:
                assert check_agreement(ours, theirs, zoo.ZOO, step=5) > 100


@pytest.mark.slow
def test_sparse_matrices_come_through(server: RunningServer) -> None:
    pytest.importorskip("asdex")
    with isolated(zoo.registry, max_execute_s=60) as running:
        with jacserve.Client(running.target) as theirs:
            with jacserve.Client(server.target) as ours:
                x = np.linspace(-1, 1, 40)
                found = theirs.jacobian("elementwise", x, mode="sparse")
                expected = ours.jacobian("elementwise", x, mode="sparse")
                np.testing.assert_array_equal(found.todense(), expected.todense())
                one = theirs.sparsity("elementwise", sizes={"n": 40})
                other = ours.sparsity("elementwise", sizes={"n": 40})
                assert one.pattern.hash == other.pattern.hash
                assert one.color_count == other.color_count == 1


def test_large_arrays_and_many_callers(client: jacserve.Client) -> None:
    large = np.random.default_rng(0).normal(size=2_000_000)
    np.testing.assert_array_equal(client.value("large", large), 2.0 * large)
    xs = np.random.default_rng(1).normal(size=(200, 3))
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda x: client.value("gentle", x), xs))
    expected = [client.value("gentle", x) for x in xs]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, np.sin(xs) * xs, rtol=1e-15)
    assert client.value("gentle", np.empty((0, 3))).shape == (0, 3)


@pytest.mark.slow
def test_very_large_arrays(client: jacserve.Client) -> None:
    large = np.random.default_rng(0).normal(size=13_000_000)
    for _ in range(3):
        np.testing.assert_array_equal(client.value("large", large), 2.0 * large)


def test_points_that_wait_are_computed_together() -> None:
    xs = np.random.default_rng(0).normal(size=(64, 3))
    with isolated(nasty_functions.patient) as server:
        with jacserve.Client(server.target) as client, ThreadPoolExecutor(32) as pool:
            ask = partial(client.evaluate, "patient_one", quantities=("value",))

            def is_together() -> bool:
                found = list(pool.map(ask, xs))
                np.testing.assert_array_equal([each.value for each in found], xs)
                return max(each.coalesced_count for each in found) > 1

            until(is_together)  # What that is worth is measured after the start.


@pytest.mark.slow
def test_functions_of_the_server_do_not_notice(tmp_path: Path) -> None:
    path = tmp_path / "mixed.py"
    path.write_text(MIXED)
    with server_process(path, JACSERVE_MAX_EXECUTE_S="2") as server:
        with jacserve.Client(server.target) as client, ThreadPoolExecutor(8) as pool:
            assert int(client.value("own_pid", 1.0)) == server.process.pid
            assert int(client.value("other_pid", 1.0)) != server.process.pid
            assert client.describe("own_pid").isolation == "none"
            assert client.describe("other_pid").isolation == "process"
            # More than there are slots for.
            stuck = [
                pool.submit(failure, lambda: client.value("stuck", 1.0))
                for _ in range(6)
            ]
            slowest = 0.0
            while not all(each.done() for each in stuck):
                start = time.monotonic()
                assert client.value("own_pid", 1.0) == server.process.pid
                slowest = max(slowest, time.monotonic() - start)
                time.sleep(0.01)
            assert slowest < 1.5  # It never waits for the budget of others.
            reasons = [each.result().reason for each in stuck]
            assert set(reasons) == {"TIME_BUDGET_SPENT", "FUNCTION_QUARANTINED"}
            assert "FUNCTION_QUARANTINED" in reasons


MIXED = """
import os, time
import jax, numpy as np
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

def back(call, x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(call, shape, x, vmap_method="expand_dims")

def own_pid(x: Float[Array, ""]) -> Float[Array, ""]:
    return back(lambda x: np.full(np.shape(x), os.getpid(), x.dtype), x)

registry.function(own_pid)
registry.function(name="other_pid", isolation="process")(own_pid)

@registry.function(isolation="process")
def stuck(x: Float[Array, ""]) -> Float[Array, ""]:
    return back(lambda x: time.sleep(1000), x)
"""


@pytest.mark.slow
def test_no_process_is_left_behind() -> None:
    environment = {"JACSERVE_MAX_EXECUTE_S": "1000", "JACSERVE_DEVICE": "cpu"}
    with server_process(FUNCTIONS, "--isolation", "process", **environment) as server:
        with jacserve.Client(server.target) as client:
            [worker] = children(server.process.pid)
            assert worker_of(client) == worker
            score = Path(f"/proc/{worker}/oom_score_adj").read_text()
            assert int(score) == 1000
            # The worker's child is its group's; the worker itself is of use no more.
            stuck = threading.Thread(
                target=lambda: failure(lambda: client.value("asleep", BAD))
            )
            stuck.start()
            time.sleep(0.5)
            server.process.send_signal(signal.SIGKILL)
            until(lambda: not is_running(worker), 10)
            stuck.join(SOON_S)


@pytest.mark.slow
def test_a_server_that_drains_ends_its_worker() -> None:
    with server_process(FUNCTIONS, "--isolation", "process") as server:
        with jacserve.Client(server.target) as client:
            worker = worker_of(client)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.errors()
        assert not is_running(worker)


@pytest.mark.slow
def test_what_a_function_has_started_ends_with_it(client: jacserve.Client) -> None:
    def sleepers() -> list[str]:
        lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline")]
        return [line.decode() for line in lines if b"86400.125" in line]

    error = failure(lambda: client.value("spawning", BAD))
    assert error.reason == "TIME_BUDGET_SPENT"
    until(lambda: not sleepers(), 10)


@pytest.mark.slow
def test_jobs_go_on_in_the_worker_of_the_next_server(tmp_path: Path) -> None:
    environment = {"JACSERVE_ISOLATION": "process", "JOB_TEST_PACE_S": "0.02"}
    arrays = points(400, 3)
    with closing(JobHome(tmp_path, **environment)) as home:
        server = home.start()
        server.calls.create("night", "dense", arrays, "jacobian", batch_size=10)
        until(lambda: len(list(home.computed())) > 8)
        server.kill()
        server = home.start()
        job = server.calls.wait("night")
        assert job.progress.done_count == 400
        found = server.calls.read("night").jacobian
        pids = {pid for pid, _ in home.computed()}
        with jacserve.Client(server.target) as client:
            expected = client.jacobian("dense", arrays)
            assert client.describe("dense").isolation == "process"
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)
    assert len(pids) >= 2
    assert server.process.pid not in pids
    assert set(home.times_computed()) == set(range(400))


@pytest.mark.slow
def test_a_job_that_does_not_end_fails_and_counts(tmp_path: Path) -> None:
    environment = {"JACSERVE_MAX_EXECUTE_S": "2", "JACSERVE_JOBS_DIR": str(tmp_path)}
    with server_process(FUNCTIONS, "--isolation", "process", **environment) as server:
        with JobCalls(server.target) as calls, jacserve.Client(server.target) as client:
            x = np.full((20, 3), np.nan)
            reasons: list[str] = []
            for name in ("one", "two", "three"):
                calls.create(name, "endless", (x,), "value", batch_size=10)
                reasons.append(reason_of(calls.wait(name, FAILED)))
            assert reasons[0] == "TIME_BUDGET_SPENT"
            assert reasons[2] == "FUNCTION_QUARANTINED"
            assert "more than 2 s" in client.describe("endless").quarantine_reason
            assert client.value("gentle", GOOD).shape == (3,)


def test_functions_that_are_in_no_file_are_refused_in_words() -> None:
    registry = Registry()
    registry.function(nasty_functions.gentle)
    with pytest.raises(RegistrationError, match=r"in no module.*keep their registry"):
        with isolated(registry):
            pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # A worker would start a server, whose worker would start one ...
        ("with serving(registry): pass", r"Start it under if __name__"),
        ("if WORKER: registry = None", r"it registers no functions"),
        ("if WORKER: f.__doc__, x = '', 1 / 0", r"ZeroDivisionError"),
        ("if WORKER: os._exit(7)", r"ended with status 7"),
    ],
)
@pytest.mark.slow
def test_a_worker_that_can_not_start_stops_the_server(
    tmp_path: Path, changes: str, words: str
) -> None:
    path = tmp_path / "unfit.py"
    path.write_text(UNFIT + changes)
    if "serving" in changes:
        done = subprocess.run(
            [sys.executable, path], capture_output=True, text=True, check=False
        )
        found = done.stderr
    else:
        with pytest.raises(AssertionError) as caught:
            with server_process(path, "--isolation", "process"):
                pass
        found = str(caught.value)
    assert re.search(words, found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "has_others", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_server_says_so_while_its_worker_can_not_be_started(
    tmp_path: Path, has_others: bool
) -> None:
    path = tmp_path / "functions.py"
    text = UNFIT + OTHER * has_others
    path.write_text(text)
    with (
        server_process(path) as server,
        jacserve.Client(server.target, retries=0, timeout_s=SOON_S) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def is_serving() -> bool:
            status = stub.Check(health_pb2.HealthCheckRequest()).status
            assert client.status().is_serving == (status == SERVING)
            return status == SERVING

        assert client.value("f", 1.0) == 1.0
        assert is_serving()
        path.write_text(text + "\nif WORKER: os._exit(7)")
        [worker] = children(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        until(lambda: not is_running(worker))
        error = failure(lambda: client.value("f", 1.0))
        assert isinstance(error, jacserve.UnavailableError)
        assert (error.reason, error.is_cut_off) == ("WORKER_UNAVAILABLE", False)
        assert is_serving() is has_others
        path.write_text(text)
        with jacserve.Client(server.target, retries=99, timeout_s=SOON_S) as patient:
            with patient.session() as session:
                assert session.value("f", 1.0) == 1.0
        assert is_serving()


UNFIT = """
import os, sys
from jaxtyping import Array, Float
from jacserve_server import Registry, serving

registry = Registry()
WORKER = "isolation.worker" in " ".join(sys.orig_argv)

@registry.function(isolation="process")
def f(x: Float[Array, ""]) -> Float[Array, ""]:
    return x

"""
OTHER = """
@registry.function
def g(x: Float[Array, ""]) -> Float[Array, ""]:
    return x
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_leaks_with_fifty_workers() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def regions() -> int:
        maps = Path("/proc/self/maps").read_text()
        return maps.count("memfd:jacserve")

    with isolated(nasty_functions.quiet) as server:
        with jacserve.Client(server.target) as client:
            large = np.ones(200_000)
            client.value("quiet_large", large)
            before = descriptors(), regions(), threading.active_count()
            for _ in range(50):
                worker = worker_of(client, "quiet_pid")
                client.value("quiet_large", large)
                os.kill(worker, signal.SIGKILL)
                until(lambda worker=worker: not is_running(worker))
                assert worker_of(client, "quiet_pid") != worker
            client.value("quiet_large", large)
            after = descriptors(), regions(), threading.active_count()
    assert all(x <= y + 3 for x, y in zip(after, before, strict=True)), (before, after)
    assert regions() == 0
