"""Keeps compiled programs across restarts, in JAX's persistent compilation cache.

Whoever can write to its folder can run code in the server: JAX loads what it finds
there. So the folder is its owner's alone, or it is not used.
"""

import logging
import os
import stat
from pathlib import Path

import jax

_log = logging.getLogger(__name__)

# JAX's own keys tell versions and devices apart; the folder's name lets an old one be
# deleted.
_FOLDER = f"programs-jax-{jax.__version__}"


def enable(cache_dir: Path, max_bytes: int) -> None:
    """Has this process keep what it compiles, and find what others have kept.

    A cache that can't be used costs time and nothing else, so it is left aside with a
    warning.

    Args:
        cache_dir: Where; a folder of this name for JAX's version is made in it.
        max_bytes: How much is kept; the least recently used goes first. 0 keeps
            nothing.
    """
    if not max_bytes:
        return
    folder = cache_dir / _FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(folder)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        _log.warning("programs are not kept in %s: %s", folder, problem)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", max_bytes)
    # By default only what took long to compile is kept; here everything is asked for.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _problem(folder: Path) -> str | None:
    """Tells why others could write to a folder."""
    found = folder.stat()
    if not hasattr(os, "getuid"):
        return None
    if found.st_uid != os.getuid():
        return "it belongs to another user. Set cache_dir to a folder of your own."
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it. Run chmod 700 on it, or set cache_dir."
    return None
