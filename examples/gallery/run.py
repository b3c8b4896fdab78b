"""Runs the pages of the gallery and redraws their pictures.

`python examples/gallery/run.py newton` runs one page, and without a name all of them.
It needs jacserve[server,sparse], scipy and matplotlib.
"""

import argparse
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

GALLERY = Path(__file__).resolve().parent

# The page's own name and line numbers stand in its tracebacks.
_EXECUTE = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'))"


def pages() -> list[Path]:
    """Lists the pages of the gallery.

    Returns:
        Their files, by name.
    """
    return sorted(page for page in GALLERY.glob("*.md") if page.name != "README.md")


def code_of(page: Path) -> str:
    """Extracts the Python code of a page.

    Args:
        page: A Markdown file.

    Returns:
        Its code blocks as one script, each line where the page has it.
    """
    lines: list[str] = []
    is_code = False
    for line in page.read_text().splitlines():
        is_fence = line.startswith("```")
        lines.append(line if is_code and not is_fence else "")
        if is_fence:
            is_code = line == "```python"
    return "\n".join(lines)


def run(page: Path) -> subprocess.CompletedProcess[str]:
    """Runs a page in a process of its own, in the folder where the page is.

    Args:
        page: A Markdown file.

    Returns:
        The finished process, with what the page has printed.
    """
    style = {"MPLBACKEND": "Agg", "MATPLOTLIBRC": str(GALLERY / "matplotlibrc")}
    return subprocess.run(
        [sys.executable, "-c", _EXECUTE, page.name],
        input=code_of(page),
        cwd=page.parent,
        env={**os.environ, **style},
        capture_output=True,
        text=True,
        check=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs pages, and prints how long each took and what it printed.

    Args:
        arguments: Names of pages, without ".md"; those of the process by default.

    Returns:
        The exit status: 0 when every page ran to its end.
    """
    known = {page.stem: page for page in pages()}
    parser = argparse.ArgumentParser(
        description="Runs pages of the gallery and redraws their pictures.",
        epilog=f"The pages are {', '.join(known)}.",
    )
    parser.add_argument("name", nargs="*", help="a page, without .md; all by default")
    names: list[str] = parser.parse_args(arguments).name or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no page {', '.join(unknown)}; the pages are {', '.join(known)}")
    status = 0
    for name in names:
        start = time.perf_counter()
        done = run(known[name])
        took_s = time.perf_counter() - start
        print(f"{name}: {took_s:.1f} s", flush=True)
        print(textwrap.indent(done.stdout + done.stderr, "  "), end="", flush=True)
        status = status or done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
