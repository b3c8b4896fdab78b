"""What the pages show is run here."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from jacserve.commands import app
from jacserve.queries import EvaluateOptions
from jacserve.vocabulary import QUANTITIES
from jacserve_server.config import Config
from jacserve_server.loading import load_registries
from jacserve_server.registration import build_catalog
from server_process import server_process

ROOT = Path(__file__).parents[1]
NEEDS_NO_EXAMPLE = {"jacserve functions"}


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def count(code: str) -> int:
    """Lines of code: no blank lines, no comments alone."""
    return len(re.findall(r"^\s*[^\s#]", code, re.M))


def test_the_readme_server_answers_the_readme_client(tmp_path: Path) -> None:
    functions, client = blocks("README.md")
    assert [count(functions), count(client)] == [8, 5]
    file = tmp_path / "functions.py"
    file.write_text(functions)
    with server_process(file) as server:
        names: dict[str, np.ndarray] = {}
        exec(client.replace("localhost:50051", server.target), names)
        assert names["jac"].shape == (2, 2)
        assert names["jacs"].shape == (2, 2, 2)
        assert names["det"] == pytest.approx(2.0)


def test_the_client_page(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    points = np.random.default_rng(0).uniform(0.5, 1.5, size=(1000, 3))
    np.save("points.npy", points)
    asking, jobs = blocks("docs/client.md")
    lines = re.findall(r"^\$ jacserve (jobs .*)$", "".join(
        blocks("docs/client.md", "console")
    ), re.M)  # fmt: skip
    environment = {"JACSERVE_JOBS_DIR": str(tmp_path / "jobs")}
    with server_process(ROOT / "examples" / "functions.py", **environment) as server:
        names: dict[str, object] = {}
        exec(asking.replace("localhost:50051", server.target), names)
        shown = capsys.readouterr().out
        assert "spherical(x: [3]) -> [3] ('forward', 'reverse')" in shown
        exec(jobs.replace("localhost:50051", server.target), names)
        shown = capsys.readouterr().out
        assert "0 1000 (1000, 3, 3)" in shown
        assert "succeeded 1.0" in shown
        for line in lines:
            arguments = [*line.split(), "--target", server.target]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, done.output
    assert len(lines) == 6
    saved = np.load("jacobians.npy")
    np.testing.assert_array_equal(np.load("jacobians.npz")["jacobian"], saved)
    np.testing.assert_allclose(saved[:, 2, 0], np.cos(points[:, 1]))


def test_the_functions_page(tmp_path: Path) -> None:
    file = tmp_path / "page.py"
    file.write_text(blocks("docs/functions.md")[0])
    specs = build_catalog(load_registries([str(file)])).specs
    assert [spec.qualified_name for spec in specs] == ["classifier@1", "classifier@2"]


def test_the_serving_page_lists_every_setting() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/serving.md").read_text(), re.M)
    assert listed == list(Config.model_fields)


def test_the_client_page_lists_every_quantity_and_option() -> None:
    text = (ROOT / "docs/client.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    options = set(EvaluateOptions.__annotations__)
    assert listed >= set(QUANTITIES) | options


def test_the_operating_page_has_every_bound() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    bounds = {
        name
        for name in Config.model_fields
        if re.match(r"max_|tls_|.*_idle_s|.*_budget_s|drain_|grace_", name)
    } - {"max_coalesced"}
    assert {name for name in bounds if f"`{name}`" not in text} == set()


def test_each_fault_names_tests_that_there_are() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    [table] = re.findall(r"^## What happens when \.\.\.\n(.*?)^## ", text, re.M | re.S)
    rows = re.findall(r"^\| (?!what |---)(.*) \|$", table, re.M)
    assert len(rows) > 12
    for row in rows:
        what, _, _, shown = re.split(r" *\| *", row)
        named = list(re.finditer(r"`([\w/]+\.py)::(\w+)`", shown))
        assert named, what
        for each in named:
            is_slow = "*slow*" in shown[: each.start()]
            assert is_marked_slow(*each.groups()) is is_slow, each.group()


def is_marked_slow(file: str, test: str) -> bool:
    module = ast.parse((ROOT / "tests" / file).read_text())
    found = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == test
    ]
    assert found, f"{file}::{test}"
    marks = [ast.unparse(mark) for mark in found[0].decorator_list]
    return "pytest.mark.slow" in marks


@pytest.mark.parametrize(
    ("heading", "folder"),
    [
        ("client", "client/jacserve"),
        ("server", "server/jacserve_server"),
        ("server, `isolation/`", "server/jacserve_server/isolation"),
        ("server, `jobs/`", "server/jacserve_server/jobs"),
    ],
)
def test_the_architecture_page_lists_every_module(heading: str, folder: str) -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.partition(f"| {heading} | |\n")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    listed = [name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)]
    modules = {path.stem for path in (ROOT / folder).glob("*.py")}
    described = {"transforms"} if heading == "server" else set[str]()
    assert sorted(listed) == sorted(modules - {"__init__", "__main__"} | described)


def test_every_command_and_option_is_explained() -> None:
    waiting: list[tuple[str, Any]] = [("jacserve", get_command(app))]
    while waiting:
        path, command = waiting.pop()
        assert command.help, path
        for each in command.params:
            if each.param_type_name == "argument":
                assert each.metavar is not None, f"{path} {each.name}"
                assert each.metavar.isupper() or "..." in each.metavar
            assert each.help.endswith("."), f"{path} {each.name}"
        inner = getattr(command, "commands", {})
        if not inner and path.count(" ") == 1:
            assert "Example: jacserve" in command.help or path in NEEDS_NO_EXAMPLE
        waiting += [(f"{path} {name}", each) for name, each in inner.items()]


def test_links_lead_somewhere() -> None:
    for page in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/*.md"),
        *ROOT.glob("examples/*/*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_tour_is_true() -> None:
    tour = subprocess.run(
        [sys.executable, ROOT / "examples" / "tour.py"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not tour.stderr
    pairs = re.findall(r"(?:det J|r\^2 sin\(polar\)) += ([\d.]+)", tour.stdout)
    assert len(pairs) == 2
    assert pairs[0] == pairs[1]
    assert "(1000, 3) -> Jacobians (1000, 3, 3)" in tour.stdout
    assert "points (250000, 3): 17 MiB streamed" in tour.stdout
    assert "shape (1, 4)\n  mode reverse" in tour.stdout
    assert "shape (10, 784) float32\n  mode reverse" in tour.stdout
    steps = re.findall(r"x = \(([\d., ]+)\)", tour.stdout)
    assert steps[-1] == steps[-2]
    assert "succeeded: 1,000,000 points" in tour.stdout
    [error] = re.findall(
        r"is off log\(r\^2 sin\(polar\)\) by at most (\S+)", tour.stdout
    )
    assert float(error) < 1e-12
