"""Where jobs may read and write: storage roots, and paths in them.

A root is a folder, or a URL that fsspec opens, to which the configuration gives a
name. Clients write "data/points.npy", the name of a root and a path in it; nothing
else of the server's storage can be named, and links don't lead out of a root.

Whatever fails below the bytes of a file is a ServiceError when it leaves this module.
A caller can therefore take every other exception for a fault in what the bytes say.
"""

import contextlib
import errno
import functools
import io
import os
import shutil
import stat
import unicodedata
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from jacserve_server.errors import ServiceError
from jacserve_server.jobs.guarded_stores import GuardedStore

_MAX_PATH_LENGTH = 1024
# Of a folder, a Zarr store's documents, in the order in which Zarr looks for them.
_DESCRIPTION = "zarr.json"
_DOCUMENTS = (_DESCRIPTION, ".zarray", ".zgroup")
# Patterns to fsspec, or parts of an address to a web server.
_NOT_IN_URLS = frozenset("*?[]{}#%&;|^`")
# What a storage says of a file's version, the surest first.
_VERSIONS = (
    "ETag", "etag", "checksum", "md5Hash", "content_md5", "crc32c", "mtime",
    "LastModified", "last_modified", "updated", "modified", "created",
)  # fmt: skip
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# Not the storage's fault, but that of what was asked for.
_UNSUITABLE = frozenset({errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR})


@dataclass(frozen=True, slots=True)
class Location:
    """A file or store in a storage root: plain data, which another machine can open.

    Attributes:
        root: The root's folder or URL, as configured. It may hold credentials.
        path: The path in it, with "/" between its parts.
        name: What the client called it: "data/points.npy".
    """

    root: str = field(repr=False)
    path: str
    name: str

    @property
    def root_name(self) -> str:
        """What clients call the root."""
        return self.name.partition("/")[0]


def locate(name: str, roots: Mapping[str, str], *, field: str) -> Location:
    """Finds what a client has named, without looking whether it is there.

    Args:
        name: The name of a root and a path in it: "data/points.npy".
        roots: The folders and URLs that may be named.
        field: The path of the request's field that names it, for errors.

    Returns:
        The location.

    Raises:
        ServiceError: SOURCE_FORBIDDEN; there is no such root, or the path would lead
            out of it.
    """
    root_name, _, path = name.partition("/")
    if root_name not in roots:
        known = ", ".join(map(repr, sorted(roots)))
        remedy = (
            f"Begin the path with one of {known}, and a slash"
            if known
            else "The server's configuration names none here"
        )
        raise ServiceError(
            "SOURCE_FORBIDDEN",
            f"{name!r} is in no storage root of the server: there is none called "
            f"{root_name!r}. {remedy}.",
            field=field,
            root=root_name,
        )
    try:
        inner = relative_path(path)
        if _folder(roots[root_name]) is None and not _NOT_IN_URLS.isdisjoint(inner):
            raise ValueError(f"has one of {' '.join(sorted(_NOT_IN_URLS))} in it")
    except ValueError as error:
        raise ServiceError(
            "SOURCE_FORBIDDEN",
            f"The path {path!r} in the storage root {root_name} {error}. Name a file "
            f'or store in it, such as "{root_name}/points.npy".',
            field=field,
            path=path,
        ) from error
    return Location(roots[root_name], inner, f"{root_name}/{inner}")


def locate_again(name: str, roots: Mapping[str, str], *, field: str) -> Location:
    """Finds what a job names that was accepted once; see `locate`.

    Args:
        name: The name of a root and a path in it.
        roots: The folders and URLs that may be named now.
        field: As for `locate`.

    Returns:
        The location.

    Raises:
        ServiceError: STORAGE_UNAVAILABLE where the root is not configured any more, or
            not on this one of several servers; otherwise as `locate`.
    """
    root_name = name.partition("/")[0]
    if root_name not in roots:
        raise ServiceError(
            "STORAGE_UNAVAILABLE",
            f"{name!r} is in the storage root {root_name}, which the server's "
            "configuration does not name now. Name it there again, the same for all "
            "servers that share the jobs, and the job goes on by itself; or delete "
            "the job.",
            field=field,
            root=root_name,
        )
    return locate(name, roots, field=field)


def relative_path(text: str) -> str:
    """Returns a path in a folder, normalised.

    Args:
        text: Parts with "/" between them, as a client has sent it.

    Returns:
        The path without "." and without a slash at its end.

    Raises:
        ValueError: It may lead out of the folder, or is none; the text says why.
    """
    if len(text) > _MAX_PATH_LENGTH:
        raise ValueError(
            f"has {len(text)} characters, of {_MAX_PATH_LENGTH} at the most"
        )
    if "\\" in text:
        raise ValueError("has a backslash in it")
    if any(_is_invisible(letter) for letter in text):
        raise ValueError("has a control character in it")
    parts = text.removesuffix("/").split("/")
    if ".." in parts:
        raise ValueError('has a part ".."')
    if "" in parts and parts != [""]:
        raise ValueError("has an empty part, or is absolute")
    kept = [part for part in parts if part not in {"", "."}]
    if not kept:
        raise ValueError("is empty")
    return "/".join(kept)


def _is_invisible(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category[0] == "C" or category in {"Zl", "Zp"}


@contextlib.contextmanager
def storage_errors(location: Location) -> Iterator[None]:
    """Makes a ServiceError of every OSError of what is done with a location.

    Args:
        location: What is read or written.

    Raises:
        ServiceError: SOURCE_UNREADABLE where the location is not there, or is no
            file; STORAGE_UNAVAILABLE where the storage is at fault, such as a full
            disk, and the same can be tried again.
    """
    try:
        yield
    except OSError as error:
        raise _service_error(location, error) from error


def _service_error(location: Location, error: OSError) -> ServiceError:
    """Tells what to mend. The error's own text has the server's folders in it."""
    root, number = location.root_name, error.errno
    cause = os.strerror(number) if number else type(error).__name__
    folder = _folder(location.root)
    if folder is not None and not folder.is_dir():
        return _unavailable(location, "is not there", "Make or mount its folder")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ServiceError(
            "SOURCE_UNREADABLE",
            f"{location.name} is not there. Put it into the storage root {root}, or "
            "name another.",
            path=location.name,
        )
    if isinstance(error, IsADirectoryError) or number in _UNSUITABLE:
        return ServiceError(
            "SOURCE_UNREADABLE",
            f"{location.name} can't be read ({cause}). Name a file, or a Zarr store.",
            path=location.name,
        )
    if number in _FULL:
        return _unavailable(
            location, f"is full ({cause})", f"Free space in the storage root {root}"
        )
    if isinstance(error, PermissionError) or number in _FORBIDDEN:
        return _unavailable(
            location,
            f"does not let the server use {location.name} ({cause})",
            "Give the server the right to it",
        )
    return _unavailable(
        location, f"can't be used now ({cause})", "Mend or mount the storage"
    )


def _unavailable(location: Location, fault: str, remedy: str) -> ServiceError:
    return ServiceError(
        "STORAGE_UNAVAILABLE",
        f"The storage root {location.root_name} {fault}. {remedy}; a job goes on by "
        "itself then.",
        path=location.name,
    )


@contextlib.contextmanager
def _transport_errors(location: Location) -> Iterator[None]:
    """As `storage_errors`, for bytes alone: a remote storage raises anything."""
    with storage_errors(location):
        try:
            yield
        except (OSError, ServiceError):
            raise
        except Exception as error:
            if _folder(location.root) is not None:
                raise
            raise _unavailable(
                location,
                f"can't be used now ({type(error).__name__})",
                "Mend the storage",
            ) from error


def _folder(root: str) -> Path | None:
    """Returns the folder of a root, or None of one that is elsewhere."""
    if root.startswith(("file://", "local://")):
        path = urllib.parse.urlsplit(root).path
        return Path(urllib.request.url2pathname(path))
    return None if "://" in root or "::" in root else Path(root)


def _real_root(location: Location) -> Path:
    """Returns a local root without links; an OSError if it is not there."""
    folder = _folder(location.root)
    assert folder is not None
    return Path(os.path.realpath(folder, strict=True))


def _real_path(location: Location, key: str = "") -> Path:
    """Follows the links of what is at a location, or in a store there.

    Raises:
        ServiceError: They lead out of the root, or to a device or pipe.
        OSError: The root is not there.
    """
    root = _real_root(location)
    real = Path(os.path.realpath(root / location.path / key))
    name = f"{location.name}/{key}" if key else location.name
    if not real.is_relative_to(root) or real == root:
        raise ServiceError(
            "SOURCE_FORBIDDEN",
            f"{name} leads out of the storage root {location.root_name} by a link. Put "
            "a copy into the root in place of the link.",
            path=name,
        )
    if _is_special(real):
        raise ServiceError(
            "SOURCE_UNREADABLE",
            f"{name} is a device, pipe or socket. Name a file, or a Zarr store.",
            path=name,
        )
    return real


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _filesystem(location: Location) -> tuple[Any, str]:
    """Returns the file system of a location that is no local folder, and its path."""
    with _installed(location), _transport_errors(location):
        # The path goes on after the root is parsed: it could hold a "::" or "://".
        system, base = url_to_fs(location.root)
        return system, _joined(base, location.path)


def _joined(base: str, path: str) -> str:
    return f"{base.rstrip('/')}/{path}"


@contextlib.contextmanager
def _installed(location: Location) -> Iterator[None]:
    protocol = location.root.partition("://")[0].rpartition("::")[2]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        known = known_implementations.get(protocol, {})
        remedy = known.get("err") or "Correct its URL in the server's configuration"
        raise ServiceError(
            "NOT_INSTALLED",
            f"The storage root {location.root_name} is at {protocol}://, which the "
            f"server can't open. On the server: {remedy}.",
            root=location.root_name,
        ) from error
    yield


def local_path(location: Location) -> Path | None:
    """Returns where a location is on this machine.

    Args:
        location: Any location.

    Returns:
        The path without links; None where the root is no local folder.

    Raises:
        ServiceError: SOURCE_FORBIDDEN, it leads out of the root; STORAGE_UNAVAILABLE,
            the root is not there.
    """
    if _folder(location.root) is None:
        return None
    with storage_errors(location):
        return _real_path(location)


def open_file(location: Location) -> BinaryIO:
    """Opens a file to read it.

    Args:
        location: Where it is.

    Returns:
        The file, of which every method raises ServiceError in place of OSError.

    Raises:
        ServiceError: It is not there, or can't be read.
    """
    path = local_path(location)
    if path is not None:
        with storage_errors(location):
            raw: Any = open(path, "rb", buffering=0, opener=_open_safely)  # noqa: SIM115
    else:
        system, remote = _filesystem(location)
        with _transport_errors(location):
            raw = system.open(remote, "rb")
    return cast(BinaryIO, io.BufferedReader(_StoredFile(raw, location)))


def _open_safely(path: str, flags: int) -> int:
    """Opens what was checked, though it became a link or a pipe a moment ago."""
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags | safe)


class _StoredFile(io.RawIOBase):
    """A file whose errors name the location."""

    def __init__(self, raw: Any, location: Location) -> None:
        self._raw = raw
        self._location = location

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _transport_errors(self._location):
            return self._raw.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _transport_errors(self._location):
            return self._raw.seek(offset, whence)

    def tell(self) -> int:
        with _transport_errors(self._location):
            return self._raw.tell()

    def close(self) -> None:
        if not self.closed:
            try:
                with _transport_errors(self._location):
                    self._raw.close()
            finally:
                super().close()


def exists(location: Location) -> bool:
    """Tells whether there is anything at a location.

    Args:
        location: A file, a folder or a store.

    Returns:
        Whether there is.

    Raises:
        ServiceError: It can't be told, or leads out of the root.
    """
    path = local_path(location)
    if path is not None:
        with storage_errors(location):
            return path.exists()
    system, remote = _filesystem(location)
    with _transport_errors(location):
        system.invalidate_cache(remote.rpartition("/")[0])
        return bool(system.exists(remote))


def identity(location: Location, array: str = "") -> str:
    """Returns a text that is another one when the file has changed.

    Args:
        location: A file, or a Zarr store, of which the metadata counts.
        array: The path of an array in a Zarr store.

    Returns:
        Size and time, or what the storage itself says of its version.

    Raises:
        ServiceError: It is not there, or can't be read.
    """
    key = f"{array}/" if array else ""
    if _folder(location.root) is not None:
        with storage_errors(location):
            path = _real_path(location)
            if path.is_dir():
                documents = [_real_path(location, key + name) for name in _DOCUMENTS]
                path = next(filter(Path.is_file, documents), documents[0])
            info = path.stat()
            return f"{info.st_size}-{info.st_mtime_ns}"
    system, remote = _filesystem(location)
    with _transport_errors(location):
        system.invalidate_cache(remote.rpartition("/")[0])
        paths = [f"{remote}/{key}{name}" for name in _DOCUMENTS]
        found = next(filter(system.isfile, [remote, *paths]), remote)
        info = system.info(found)
        version = next((info[name] for name in _VERSIONS if info.get(name)), "")
        return f"{info.get('size')}-{version}"


@contextlib.contextmanager
def unchanged(location: Location, array: str, known: str) -> Iterator[None]:
    """Checks, after a job has read a file, that it is still the one that it was.

    Args:
        location: A file, or a Zarr store.
        array: The path of an array in a Zarr store.
        known: Its identity when the job was made; "" for any.

    Raises:
        ServiceError: In place of whatever the block has raised, STORAGE_UNAVAILABLE
            where the file is gone, as with a volume that is not mounted, and
            SOURCE_UNREADABLE where it has changed.
    """
    try:
        yield
    finally:
        try:
            found = identity(location, array)
        except ServiceError as error:
            if error.reason != "SOURCE_UNREADABLE":
                raise
            raise ServiceError(
                "STORAGE_UNAVAILABLE",
                f"{location.name} is not there any more. Mount its volume, or bring it "
                "back, and the job goes on by itself; or delete the job.",
                path=location.name,
            ) from error
        if known and found != known:
            raise ServiceError(
                "SOURCE_UNREADABLE",
                f"{location.name} has changed since the job was made. Submit the job "
                "again.",
                path=location.name,
            )


def remove(location: Location) -> None:
    """Removes a file, or a folder and all in it; nothing if it is not there.

    Of a Zarr store its description goes last: one that is removed in part can still be
    told from others, and removed.

    Args:
        location: Where it is. A link is removed, and not what it leads to.

    Raises:
        ServiceError: It leads out of the root, or can't be removed.
    """
    if _folder(location.root) is None:
        system, remote = _filesystem(location)
        with _transport_errors(location), contextlib.suppress(FileNotFoundError):
            if system.isdir(remote):
                for path in system.ls(remote, detail=False):
                    if not path.endswith(f"/{_DESCRIPTION}"):
                        system.rm(path, recursive=True)
            system.rm(remote, recursive=True)
        return
    with storage_errors(location):
        parent, _, last = location.path.rpartition("/")
        above = Location(location.root, parent, location.name)
        folder = _real_path(above) if parent else _real_root(location)
        path = folder / last
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            for inner in path.iterdir():
                if inner.is_dir() and not inner.is_symlink():
                    shutil.rmtree(inner)
                elif inner.name != _DESCRIPTION:
                    inner.unlink(missing_ok=True)
            shutil.rmtree(path)


def zarr_store(
    location: Location, *, is_writable: bool, is_whole: bool = False
) -> Store:
    """Returns the store at a location, for Zarr.

    Args:
        location: A Zarr store, or where to make one.
        is_writable: Whether it may be written to.
        is_whole: As for `GuardedStore`.

    Returns:
        A store, of which every method raises ServiceError in place of OSError, and
        that follows no link out of the root.

    Raises:
        ServiceError: The location leads out of the root, or can't be reached.
    """
    guard = functools.partial(_guarded, location)
    path = local_path(location)
    if path is not None:
        store = LocalStore(path, read_only=not is_writable)
        return GuardedStore(store, guard, is_whole=is_whole)
    with _installed(location), _transport_errors(location):
        root = FsspecStore.from_url(location.root)
        path = _joined(root.path, location.path)
        store = FsspecStore(root.fs, path=path, read_only=not is_writable)
        return GuardedStore(store, guard, is_whole=is_whole)


@contextlib.contextmanager
def _guarded(location: Location, key: str) -> Iterator[None]:
    with _transport_errors(location):
        # Also sees to it that a vanished root is not made anew, and does not pass for
        # a store whose chunks were never written.
        if _folder(location.root) is not None:
            _real_path(location, key)
        yield
