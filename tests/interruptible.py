"""Starts the command line so that Ctrl-C reaches it, whoever runs the tests."""

import sys

# What is run in the background of a shell is told to ignore SIGINT.
COMMAND = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from jacserve.__main__ import main; main()",
]
