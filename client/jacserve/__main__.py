"""Entry point of the command line, `jacserve` or `python -m jacserve`."""

import sys


def main() -> None:
    """Runs the command line, or says what to install for it."""
    try:
        from jacserve.commands import main as run
    except ModuleNotFoundError as error:
        if error.name not in {"rich", "typer"}:
            raise
        sys.exit(f'{error.name} is missing. Run: pip install "jacserve[cli]"')
    run()


if __name__ == "__main__":
    main()
