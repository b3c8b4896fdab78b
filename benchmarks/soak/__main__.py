"""Puts the soak together: `python -m benchmarks.soak`, or `make soak`."""

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.fast_path.processes import ROOT
from benchmarks.soak.activities import check_complete
from benchmarks.soak.clients import Clients
from benchmarks.soak.credentials import Credentials
from benchmarks.soak.roles import WHAT_MUST_BE_SEEN, Roles
from benchmarks.soak.server import Absence, Sample, SoakServer, within
from benchmarks.soak.verdict import Line, flat_lines, print_verdict

# Then the server is left alone, to see whether what it takes is flat.
_RESTARTS_UNTIL = 0.3
_RESTART_EVERY_S = 45.0
_SAY_EVERY_S = 10.0
# A client hears of a server that is back only at its next attempt.
_SLACK_S = 5.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seconds: Annotated[
        float, typer.Option(help="How long; SOAK_S says so, too.", min=20)
    ] = float(os.environ.get("SOAK_S", "600")),
    clients: Annotated[int, typer.Option(help="Clients at a time.", min=1)] = 3,
    restarts: Annotated[
        bool, typer.Option(help="Stop and kill the server in the first third.")
    ] = True,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting of the server; repeatable."
        ),
    ] = None,
) -> None:
    """Soak a server: everything at once, with kills; every answer is checked.

    The status is 1 where something does not hold.
    """
    check_complete()
    chosen = dict(each.split("=", 1) for each in settings or ())
    console = Console(width=None if sys.stdout.isatty() else 120)
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jacserve-soak-", dir=ROOT / "build") as at:
        folder = Path(at)
        credentials = Credentials(folder)
        credentials.create("nobody", [])  # Without the file no server starts.
        with SoakServer(folder, credentials, chosen) as server:
            with (
                Clients(server.targets, folder, credentials, clients) as running,
                Roles(server.target, server.metrics_url, credentials) as roles,
            ):
                samples = _soak(server, running, roles, seconds, restarts, console)
                faults = running.finish()
                roles.finish()
            server.stop()
            faults += server.faults + roles.faults
            faults += faults_in(server.log())
    lines = [
        *_counts(running, server.absences),
        *_role_lines(roles),
        *flat_lines(samples),
    ]
    lines.append(Line("faults", str(len(faults)), "0", not faults))
    for text in (*faults, *_problems(running)):
        console.print(text, markup=False, highlight=False)
    sys.exit(0 if print_verdict(lines, console) else 1)


def _soak(
    server: SoakServer,
    running: Clients,
    roles: Roles,
    seconds: float,
    restarts: bool,
    console: Console,
) -> Sequence[Sample]:
    """Lets it run; returns samples since the server was last started."""
    start = time.monotonic()
    restart_s = min(_RESTART_EVERY_S, _RESTARTS_UNTIL * seconds / 2)
    kill_s = max(8.0, seconds / 30)
    next_restart, next_kill, next_words = restart_s, kill_s, 0.0
    signals = (signal.SIGTERM, signal.SIGKILL)
    samples: list[Sample] = []
    while (now := time.monotonic() - start) < seconds:
        if restarts and now >= next_restart and now <= _RESTARTS_UNTIL * seconds + 1:
            roles.server_goes()
            server.restart(signals[len(server.absences) % 2])
            roles.server_is_back()
            next_restart += restart_s
            samples = []
        if now >= next_kill:
            running.kill(running.kills)
            next_kill += kill_s
        sample = server.look()
        if sample is None:
            break
        samples.append(sample)
        if now >= next_words:
            next_words = now + _SAY_EVERY_S
            answers = sum(running.answers().values())
            console.print(
                f"{now:4.0f} s  {answers:9,} answers  "
                f"{sample.memory_bytes / 2**20:5,.0f} MiB  {sample.threads:3} threads  "
                f"{sample.files:3} files  {len(server.absences)} restarts  "
                f"{running.kills} clients killed",
                highlight=False,
            )
        time.sleep(0.5)
    return samples


def _counts(running: Clients, absences: Sequence[Absence]) -> list[Line]:
    """Says what was answered, and what was not."""
    told = running.told
    wrong = sum("wrong" in each for each in told)
    lost = sum("lost" in each for each in told)
    away = [at for each in told for at in each["away"]]
    unexplained = [at for at in away if not within(at, absences, _SLACK_S)]
    done = Counter(each["activity"] for each in told)
    lines = [
        Line(
            name, f"{count:,} answers checked, {done[name]:,} times", "some", count > 0
        )
        for name, count in sorted(running.answers().items())
    ]
    how = Counter(each.how for each in absences)
    return [
        *lines,
        Line("wrong answers", str(wrong), "0", wrong == 0),
        Line("lost", str(lost), "0", lost == 0),
        Line(
            "server stopped or killed",
            ", ".join(f"{count} by {name}" for name, count in how.items()) or "never",
        ),
        Line("clients killed", str(running.kills)),
        Line("asked again while it was away", str(len(away) - len(unexplained))),
        Line(
            "unavailable while it was there",
            str(len(unexplained)),
            "0",
            not unexplained,
        ),
        Line(
            "of these, cancelled by a server that stopped",
            str(sum(each["cancelled"] for each in told)),
        ),
        Line("refused for being busy", str(sum(each["refusals"] for each in told))),
    ]


def _role_lines(roles: Roles) -> list[Line]:
    """Says what the witness, the guest and the vandal have seen."""
    return [
        Line(what, f"{roles.done[what]:,}", "some", roles.done[what] > 0)
        for what in WHAT_MUST_BE_SEEN
    ]


# What JAX says of a callback that raises; gRPC, of a client that has vanished; and the
# server, of a function that fails or ends its worker, as some here do.
_PROVOKED = ("jax._src.callback", "ExecuteBatchError raised in core")
_PROVOKED_REASONS = {"EXECUTION_FAILED", "WORKER_DIED"}


def faults_in(log: str) -> list[str]:
    """Returns the lines of a server's log about faults that nobody has provoked."""
    return [line for line in log.splitlines() if _is_fault(line)]


def _is_fault(line: str) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        # Of the interpreter itself, which does not know of the log.
        return line.startswith(("Traceback", "Exception ignored", "Task exception"))
    if entry["level"] not in ("error", "critical"):
        return False
    is_known = any(each in line for each in _PROVOKED)
    return not is_known and entry.get("reason") not in _PROVOKED_REASONS


def _problems(running: Clients) -> list[str]:
    return [
        f"{each['activity']}: {each.get('wrong') or each['lost']}"
        for each in running.told
        if "wrong" in each or "lost" in each
    ]


if __name__ == "__main__":
    app()
