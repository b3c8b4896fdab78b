import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from jacserve_server.jobs.liveness import Presence

CHILD = """
import sys
from pathlib import Path
from jacserve_server.jobs.liveness import Presence
presence = Presence(Path(sys.argv[1]))
print(presence.id, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def presence(tmp_path: Path) -> Iterator[Presence]:
    made = Presence(tmp_path)
    yield made
    made.close()


@contextmanager
def other_server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def files(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "servers").iterdir()}


def test_a_server_lives_until_it_is_closed(presence: Presence, tmp_path: Path) -> None:
    other = Presence(tmp_path)
    for looking in (presence, other):
        assert looking.is_alive(presence.id)
        assert looking.is_alive(other.id)
    other.close()
    assert not presence.is_alive(other.id)
    assert not other.is_alive(other.id)
    assert files(tmp_path) == {presence.id}


def test_one_that_never_was_is_dead(presence: Presence, tmp_path: Path) -> None:
    assert not presence.is_alive(uuid4().hex)
    assert files(tmp_path) == {presence.id}


def test_a_killed_process_is_dead_and_a_stopped_one_is_not(
    presence: Presence, tmp_path: Path
) -> None:
    with other_server(tmp_path) as (process, other):
        assert presence.is_alive(other)
        process.send_signal(signal.SIGSTOP)
        assert presence.is_alive(other)
        process.kill()
        process.wait()
        assert files(tmp_path) == {presence.id, other}
        assert not presence.is_alive(other)
        assert files(tmp_path) == {presence.id}
        assert not presence.is_alive(other)


def test_a_thread_may_close_what_another_has_opened(
    presence: Presence, tmp_path: Path
) -> None:
    opened: list[Presence] = []
    opening = threading.Thread(target=lambda: opened.append(Presence(tmp_path)))
    opening.start()
    opening.join()
    (other,) = opened
    assert presence.is_alive(other.id)
    other.close()
    assert not presence.is_alive(other.id)


def test_whoever_looks_never_takes_the_living_for_dead(
    presence: Presence, tmp_path: Path
) -> None:
    """Many look at once, at one that lives and at one that is dead."""
    looking = [Presence(tmp_path) for _ in range(4)]
    seen: list[bool] = []
    with other_server(tmp_path) as (_, living):
        for _ in range(20):
            with other_server_file(tmp_path) as dead:
                threads = [
                    threading.Thread(
                        target=lambda who=who, dead=dead: (
                            who.is_alive(dead),
                            seen.extend(who.is_alive(living) for _ in range(20)),
                        )
                    )
                    for who in looking
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not presence.is_alive(dead)
    assert seen == [True] * (20 * 20 * 4)
    for who in looking:
        who.close()


@contextmanager
def other_server_file(folder: Path) -> Iterator[str]:
    """What a dead server leaves."""
    dead = uuid4().hex
    (folder / "servers" / f"{dead}.lock").touch()
    yield dead
    assert dead not in files(folder)


def test_what_cannot_be_told_is_taken_for_alive(
    presence: Presence, tmp_path: Path
) -> None:
    other = Presence(tmp_path)
    (tmp_path / "servers").rename(tmp_path / "away")
    assert presence.is_alive(other.id)
    (tmp_path / "away").rename(tmp_path / "servers")
    assert presence.is_alive(other.id)
    other.close()
    assert not presence.is_alive(other.id)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs file descriptors of POSIX")
def test_no_look_leaves_a_file_open(presence: Presence, tmp_path: Path) -> None:
    descriptors = Path("/dev/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(10):
        with other_server_file(tmp_path) as dead:
            assert not presence.is_alive(dead)
    assert len(list(descriptors.iterdir())) == before
