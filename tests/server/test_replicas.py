"""The copies of programs on further devices belong to whom the programs belong to."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

from jacserve_server.replicas import Replicas

MOST_WAITING = 64


class Program:
    def __init__(self, owner: str) -> None:
        self.owner = owner


class Compiler:
    """Makes copies once its gate is open, and remembers in which order."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.made: list[str] = []

    def make(self, program: Program, place: int) -> Program:
        assert place == 0
        self.gate.wait(10)
        self.made.append(program.owner)
        return program


def run(
    scenario: Callable[[Compiler, Replicas[Program]], Awaitable[None]], **most: int
) -> None:
    async def main() -> None:
        compiler = Compiler()
        limits = {"max_programs": 4, "max_owned_programs": None, **most}
        replicas = Replicas[Program](compiler.make, 1, **limits)  # pyright: ignore[reportArgumentType]
        try:
            await asyncio.wait_for(scenario(compiler, replicas), 20)
        finally:
            replicas.close()

    asyncio.run(main())


def look_for(replicas: Replicas[Program], owner: str, count: int = 1) -> list[Program]:
    programs = [Program(owner) for _ in range(count)]
    for program in programs:
        replicas.note_owner(program, owner)
        assert replicas.find(program, 0) is None
    return programs


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def test_nobody_drives_out_the_copies_of_others() -> None:
    async def scenario(compiler: Compiler, replicas: Replicas[Program]) -> None:
        compiler.gate.set()
        [warmed_up, bobs] = look_for(replicas, "") + look_for(replicas, "bob")
        flood = look_for(replicas, "ada", 20)
        await until(lambda: len(compiler.made) == 22)
        await until(lambda: len(replicas) == 4)
        assert replicas.find(warmed_up, 0) is warmed_up
        assert replicas.find(bobs, 0) is bobs
        assert [replicas.find(each, 0) for each in flood[-2:]] == flood[-2:]

    run(scenario)


def test_one_has_no_more_copies_than_it_may() -> None:
    async def scenario(compiler: Compiler, replicas: Replicas[Program]) -> None:
        compiler.gate.set()
        look_for(replicas, "ada", 20)
        await until(lambda: len(compiler.made) == 20)
        await until(lambda: len(replicas) == 2)

    run(scenario, max_owned_programs=2)


def test_a_flood_waits_within_bounds_and_for_its_turns() -> None:
    async def scenario(compiler: Compiler, replicas: Replicas[Program]) -> None:
        flood = look_for(replicas, "ada", 200)
        assert len(replicas) == 1 + MOST_WAITING
        [bobs] = look_for(replicas, "bob")
        compiler.gate.set()
        await until(lambda: replicas.find(bobs, 0))
        assert compiler.made.index("bob") <= 2
        # What was passed over is made when it is looked for later.
        await until(lambda: len(compiler.made) == MOST_WAITING + 2)
        await until(lambda: replicas.find(flood[-1], 0))

    run(scenario, max_programs=999)


def test_what_fails_is_made_when_it_is_looked_for_again() -> None:
    told: list[bool] = []

    async def main() -> None:
        failures = [RuntimeError("no"), RuntimeError("no")]

        def make(program: Program, place: int) -> Program:
            if failures:
                raise failures.pop()
            return program

        replicas = Replicas[Program](make, 1, max_programs=4, max_owned_programs=None)
        replicas.when_ready(lambda: told.append(True))
        [program] = look_for(replicas, "ada")
        await until(lambda: len(replicas) == 0)
        # Nobody is told, who would look for it in vain, again and again.
        assert (told, len(failures)) == ([], 1)
        await until(lambda: replicas.find(program, 0))
        assert told == [True]
        assert await replicas.get(program, 0) is program
        replicas.close()

    asyncio.run(main())
