"""The pages of the gallery run, and draw what they show."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib import image

GALLERY = Path(__file__).parents[1] / "examples" / "gallery"


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery_run", GALLERY / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()
PAGES = runner.pages()
NAMES = [page.stem for page in PAGES]


def embedded(page: Path) -> list[tuple[str, str]]:
    """The pictures of a page: alternative text and file."""
    return re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text())


def assert_is_a_picture(file: Path) -> None:
    pixels = image.imread(file)
    height, width = pixels.shape[:2]
    assert width >= 700
    assert height >= 200
    assert len(np.unique(pixels.reshape(height * width, -1), axis=0)) > 50
    assert pixels[..., :3].std() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_runs_and_draws_its_picture(page: Path, tmp_path: Path) -> None:
    done = runner.run(Path(shutil.copy(page, tmp_path)))
    assert done.stderr == ""
    assert done.returncode == 0
    assert [file.name for file in tmp_path.glob("*.png")] == [f"{page.stem}.png"]
    assert_is_a_picture(tmp_path / f"{page.stem}.png")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_shows_its_picture_and_describes_it(page: Path) -> None:
    [(text, file)] = embedded(page)
    assert file == f"{page.stem}.png"
    assert len(text) > 30
    assert_is_a_picture(GALLERY / file)
    assert (GALLERY / file).stat().st_size < 150_000


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_checks_what_it_claims(page: Path) -> None:
    code = runner.code_of(page)
    assert re.search(r"^assert |^np\.testing\.assert_", code, re.M)
    assert "serving(registry)" in code


def test_the_index_lists_every_page_by_name_and_picture() -> None:
    text = (GALLERY / "README.md").read_text()
    listed = re.findall(r'<img src="(\w+)\.png"[^>]*alt="[^"]+">\]\((\w+)\.md\)', text)
    assert sorted(listed) == [(name, name) for name in NAMES]
    titles = dict(re.findall(r"\| \[([^]<]+)\]\((\w+\.md)\)", text))
    assert {
        page.read_text().partition("\n")[0].removeprefix("# "): page.name
        for page in PAGES
    } == titles


def test_code_stands_on_the_lines_where_the_page_has_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\na = 1\n```\n\n```text\nb\n```\n\n"
        "```python\n\nc = 1 / 0\n```\n"
    )
    lines = {n: s for n, s in enumerate(runner.code_of(page).split("\n"), 1) if s}
    assert lines == {4: "a = 1", 13: "c = 1 / 0"}
    done = runner.run(page)
    assert done.returncode != 0
    assert 'File "page.md", line 13' in done.stderr
    assert "ZeroDivisionError" in done.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, GALLERY / "run.py", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_runner_says_what_it_does_and_what_there_is() -> None:
    shown = command("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in NAMES)
    refused = command("no_such_page")
    assert refused.returncode == 2
    assert "no page no_such_page; the pages are backpropagation," in refused.stderr


def test_the_runner_prints_what_pages_print_and_fails_as_they_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README.md").write_text("# Index\n")
    (tmp_path / "good.md").write_text('```python\nprint("a line")\n```\n')
    (tmp_path / "bad.md").write_text("```python\nassert 1 == 2\n```\n")
    monkeypatch.setattr(runner, "GALLERY", tmp_path)
    assert runner.main(["good"]) == 0
    assert re.fullmatch(r"good: \d+\.\d s\n  a line\n", capsys.readouterr().out)
    assert runner.main([]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("bad: ")
    assert "AssertionError" in shown
    assert "good: " in shown
