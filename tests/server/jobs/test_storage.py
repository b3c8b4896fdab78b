"""What may be read and written, and what is said of a storage that fails."""

import asyncio
import errno
import io
import os
import resource
import shutil
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import given, strategies as st

from jacserve_server.errors import ServiceError
from jacserve_server.jobs.storage import (
    Location,
    identity,
    local_path,
    locate,
    open_file,
    remove,
    storage_errors,
    zarr_store,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A storage root, beside which there is something else."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.npy").write_bytes(b"secret")
    folder = tmp_path / "srv"
    folder.mkdir()
    return folder


@pytest.fixture(params=["local", "file URL", "memory"])
def anywhere(request: pytest.FixtureRequest, root: Path) -> str:
    """A storage root of each kind."""
    urls = {"local": str(root), "file URL": root.as_uri(), "memory": f"memory:/{root}"}
    return urls[request.param]


def at(root: object, path: str) -> Location:
    return locate(f"data/{path}", {"data": str(root)}, field="output")


def put(location: Location, data: bytes) -> None:
    system, base = fsspec.url_to_fs(location.root)
    system.makedirs(f"{base}/{location.path}".rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{base}/{location.path}", data)


def reason(error: pytest.ExceptionInfo[ServiceError]) -> str:
    """The error's reason, once it is sure that its text gives nothing away."""
    texts = [error.value.message, *error.value.metadata.values()]
    assert not any("/srv" in text or "secret@" in text for text in texts)
    return error.value.reason


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("data/points.npy", "points.npy"),
        ("data/a/b/c.npy", "a/b/c.npy"),
        ("data/./a/./b.npy", "a/b.npy"),
        ("data/x.zarr/", "x.zarr"),
        ("data/..points...npy", "..points...npy"),
        ("data/größe 1.npy", "größe 1.npy"),
        ("data/data/points.npy", "data/points.npy"),
    ],
)
def test_names(name: str, path: str) -> None:
    location = locate(name, {"data": "/srv"}, field="f")
    assert location == Location("/srv", path, f"data/{path}")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "data",
        "data/",
        "data/.",
        "data/./",
        "data/..",
        "data/../x.npy",
        "data/a/../x.npy",
        "data/a/..",
        "data//etc/passwd",
        "data/a//b.npy",
        "data/a//",
        "/data/x.npy",
        "../data/x.npy",
        "./data/x.npy",
        "other/x.npy",
        "DATA/x.npy",
        "/etc/passwd",
        "data\\x.npy",
        "data/..\\x.npy",
        "data/a\0.npy",
        "data/a\n.npy",
        "data/a\x7f.npy",
        "data/a\u202e.npy",
        "data/" + "a/" * 513 + "x.npy",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ServiceError) as error:
        locate(name, {"data": "/srv"}, field="output")
    assert reason(error) == "SOURCE_FORBIDDEN"
    assert error.value.field == "output"


@pytest.mark.parametrize(
    "path", ["%2e%2e/x.npy", "a*", "a?b", "x.npy#y", "[ab]", "a;b", "a&b"]
)
def test_what_means_something_in_urls_is_refused_there(path: str) -> None:
    assert at("/srv", path).path == path
    with pytest.raises(ServiceError) as error:
        at("https://example.org/x", path)
    assert reason(error) == "SOURCE_FORBIDDEN"


def test_the_roots_that_there_are_are_named() -> None:
    with pytest.raises(ServiceError, match="'data', 'results'"):
        locate("x/y", {"results": "/srv/a", "data": "/srv/b"}, field="f")
    with pytest.raises(ServiceError, match="names none"):
        locate("x/y", {}, field="f")


@given(st.text(alphabet="ab./\\ \0%~:", max_size=12))
def test_no_name_leads_out_of_the_root(text: str) -> None:
    try:
        location = at("/srv/root", text)
    except ServiceError:
        return
    path = os.path.normpath(f"/srv/root/{location.path}")
    assert path == f"/srv/root/{location.path}"
    assert len(path) > len("/srv/root/")


def test_a_location_does_not_show_its_root() -> None:
    assert "secret" not in repr(at("s3://key:secret@bucket", "x.npy"))


def test_files_are_read(anywhere: str) -> None:
    location = at(anywhere, "a/points.npy")
    put(location, b"0123456789" * 10_000)
    with open_file(location) as file:
        assert file.read(4) == b"0123"
        assert file.seek(-5, io.SEEK_END) == 99_995
        assert file.read() == b"56789"
        file.seek(10)
        buffer = bytearray(50_000)
        assert file.readinto(buffer) == 50_000  # type: ignore[attr-defined]
        assert bytes(buffer) == b"0123456789" * 5_000
    assert file.closed


def test_local_paths(root: Path) -> None:
    assert local_path(at(root, "a/x.npy")) == root.resolve() / "a" / "x.npy"
    assert local_path(at(root.as_uri(), "x.npy")) == root.resolve() / "x.npy"
    assert local_path(at("memory://srv", "x.npy")) is None


def test_what_is_not_there(anywhere: str) -> None:
    for use in (open_file, identity):
        with pytest.raises(ServiceError, match=r"data/a/x\.npy is not there") as error:
            use(at(anywhere, "a/x.npy"))
        assert reason(error) == "SOURCE_UNREADABLE"


def test_what_is_no_file(root: Path) -> None:
    (root / "folder.npy").mkdir()
    (root / "file").touch()
    os.mkfifo(root / "pipe.npy")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.npy"))
        for path in ("folder.npy", "file/x.npy", "pipe.npy", "socket.npy", "a" * 300):
            with pytest.raises(ServiceError) as error:
                open_file(at(root, path))
            assert reason(error) == "SOURCE_UNREADABLE"


def links(root: Path) -> None:
    """Makes links of every kind."""
    outside = root.parent / "outside"
    (root / "inside").mkdir()
    (root / "inside" / "x.npy").write_bytes(b"inside")
    (root / "file.npy").symlink_to(outside / "secret.npy")
    (root / "folder").symlink_to(outside)
    (root / "relative").symlink_to("../outside")
    (root / "up").symlink_to("..")
    (root / "hop").symlink_to("relative")
    (root / "itself").symlink_to(".")
    (root / "loop.npy").symlink_to("loop.npy")
    (root / "dangling.npy").symlink_to(outside / "none.npy")
    (root / "good.npy").symlink_to("inside/x.npy")
    (root / "good").symlink_to(root / "inside")


@pytest.mark.parametrize(
    "path",
    [
        "file.npy",
        "folder/secret.npy",
        "relative/secret.npy",
        "up/outside/secret.npy",
        "hop/secret.npy",
        "dangling.npy",
        "folder/new/x.npy",
        "itself",
    ],
)
def test_links_that_lead_out_are_refused(root: Path, path: str) -> None:
    links(root)
    for use in (local_path, open_file, identity, written):
        with pytest.raises(ServiceError, match="by a link") as error:
            use(at(root, path))
        assert reason(error) == "SOURCE_FORBIDDEN"
    assert [p.name for p in (root.parent / "outside").iterdir()] == ["secret.npy"]


@pytest.mark.parametrize(
    "path", ["good.npy", "good/x.npy", "itself/inside/x.npy", "up/srv/inside/x.npy"]
)
def test_links_that_stay_inside_are_followed(root: Path, path: str) -> None:
    links(root)
    assert open_file(at(root, path)).read() == b"inside"


def test_a_loop_of_links_is_no_file(root: Path) -> None:
    links(root)
    with pytest.raises(ServiceError) as error:
        open_file(at(root, "loop.npy"))
    assert reason(error) == "SOURCE_UNREADABLE"


def test_a_root_may_be_a_link(root: Path) -> None:
    links(root)
    (root.parent / "link").symlink_to(root)
    assert open_file(at(root.parent / "link", "good.npy")).read() == b"inside"
    written(at(root.parent / "link", "new.zarr"))
    assert (root / "new.zarr" / "zarr.json").is_file()


def test_identity_changes_with_the_file(anywhere: str) -> None:
    location = at(anywhere, "x.npy")
    seen: list[str] = []
    for data in (b"one", b"two", b"three"):
        time.sleep(0.01)
        put(location, data)
        seen.append(identity(location))
        assert identity(location) == seen[-1]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("version", [2, 3])
def test_identity_of_a_store_is_that_of_its_metadata(
    anywhere: str, version: Any
) -> None:
    location = at(anywhere, "x.zarr")
    store = zarr_store(location, is_writable=True)
    for path in ("", "inner"):
        group = zarr.open_group(store, mode="a", zarr_format=version)
        if path:
            group.create_array(path, shape=(4,), chunks=(2,), dtype="f8")
        before = identity(location, path)
        time.sleep(0.01)
        node = group[path] if path else group
        assert isinstance(node, zarr.Group | zarr.Array)
        node.attrs["changed"] = True
        assert identity(location, path) != before


def written(location: Location) -> np.ndarray:
    """What a store gives back."""
    numbers = np.arange(60.0).reshape(20, 3)
    store = zarr_store(location, is_writable=True)
    array = zarr.create_array(store, shape=(20, 3), chunks=(4, 3), dtype="f8")
    array[:] = numbers
    read = zarr.open_array(zarr_store(location, is_writable=False), mode="r")[:]
    np.testing.assert_array_equal(np.asarray(read), numbers)
    return numbers


def test_stores_are_written_and_read(anywhere: str) -> None:
    location = at(anywhere, "a/x.zarr")
    written(location)
    store = zarr_store(location, is_writable=True)
    array = zarr.open_array(store, mode="r+")
    array[3:5] = 0.0
    array.resize((8, 3))
    group = zarr.open_group(zarr_store(at(anywhere, "g.zarr"), is_writable=True))
    group.create_array("x", data=np.arange(3))
    group.create_group("inner").create_array("y", data=np.arange(4))
    assert sorted(name for name, _ in group.members(max_depth=None)) == [
        "inner", "inner/y", "x"
    ]  # fmt: skip
    del group["inner"]
    assert sorted(group.array_keys()) == ["x"]
    assert np.asarray(array[:]).sum() == np.delete(np.arange(24.0), range(9, 15)).sum()


def test_a_store_to_be_read_is_not_written(anywhere: str) -> None:
    location = at(anywhere, "x.zarr")
    numbers = written(location)
    array = zarr.open_array(zarr_store(location, is_writable=False), mode="r")
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0.0
    np.testing.assert_array_equal(np.asarray(array[:]), numbers)


@pytest.mark.parametrize("link", ["x.zarr/c/0/0", "x.zarr/c/0", "x.zarr/c", "x.zarr"])
def test_links_in_a_store(root: Path, link: str) -> None:
    """One that leads out is neither read through nor written through."""
    location = at(root, "x.zarr")
    numbers = written(location)
    store = zarr_store(location, is_writable=True)
    array = zarr.open_array(store, mode="r+")
    inside, outside = root / "moved", root.parent / "outside" / "moved"
    shutil.move(root / link, inside)
    (root / link).symlink_to(inside)
    np.testing.assert_array_equal(np.asarray(array[:]), numbers)
    (root / link).unlink()
    shutil.move(inside, outside)
    (root / link).symlink_to(outside)
    before = tree(outside)
    for use in (lambda: array[:], lambda: array.__setitem__(slice(0, 4), 7.0)):
        with pytest.raises(ServiceError, match="by a link") as error:
            use()
        assert reason(error) == "SOURCE_FORBIDDEN"
    assert tree(outside) == before


def tree(path: Path) -> dict[str, bytes]:
    files = [path, *path.rglob("*")]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def test_linked_metadata_does_not_show_what_is_outside(root: Path) -> None:
    written(at(root, "x.zarr"))
    shutil.move(root / "x.zarr", root.parent / "outside" / "x.zarr")
    (root / "y.zarr").mkdir()
    (root / "y.zarr" / "zarr.json").symlink_to(root.parent / "outside/x.zarr/zarr.json")
    store = zarr_store(at(root, "y.zarr"), is_writable=False)
    with pytest.raises(ServiceError, match="by a link"):
        zarr.open(store, mode="r")
    (root / "z.zarr").mkdir()
    (root / "z.zarr" / "inner").symlink_to(root.parent / "outside")
    group = zarr.open_group(zarr_store(at(root, "z.zarr"), is_writable=True))
    with pytest.raises(ServiceError, match="by a link"):
        list(group.members(max_depth=None))


def test_a_linked_folder_in_a_store_is_not_listed(root: Path) -> None:
    (root / "x.zarr").mkdir()
    (root / "x.zarr" / "inner").symlink_to(root.parent / "outside")
    store = zarr_store(at(root, "x.zarr"), is_writable=False)

    async def names(listed: AsyncIterator[str]) -> list[str]:
        return [name async for name in listed]

    assert asyncio.run(names(store.list_dir(""))) == ["inner"]
    for listed in (store.list_dir, store.list_prefix):
        with pytest.raises(ServiceError, match="by a link"):
            asyncio.run(names(listed("inner")))


def test_a_pipe_in_a_store_does_not_hold_up(root: Path) -> None:
    location = at(root, "x.zarr")
    written(location)
    (root / "x.zarr/c/0/0").unlink()
    os.mkfifo(root / "x.zarr/c/0/0")
    array = zarr.open_array(zarr_store(location, is_writable=False), mode="r")
    with pytest.raises(ServiceError, match="pipe"):
        array[:]


def test_a_root_that_vanishes(root: Path) -> None:
    location = at(root, "x.zarr")
    written(location)
    store = zarr_store(location, is_writable=True)
    array = zarr.open_array(store, mode="r+")
    (root / "x.npy").write_bytes(b"0")
    with open_file(at(root, "x.npy")):
        root.rename(root.parent / "moved")
    uses = [
        lambda: array[:],
        lambda: array.__setitem__(0, 1.0),
        lambda: zarr.create_array(store, shape=3, dtype="f8", overwrite=True),
        lambda: open_file(at(root, "x.npy")),
        lambda: identity(at(root, "x.npy")),
        lambda: zarr_store(location, is_writable=True),
        lambda: remove(location),
    ]
    for use in uses:
        with pytest.raises(ServiceError, match="storage root data is not there") as e:
            use()
        assert reason(e) == "STORAGE_UNAVAILABLE"
    assert not root.exists()
    (root.parent / "moved").rename(root)
    array[0] = 1.0
    assert np.asarray(array[:])[0, 0] == 1.0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "Free space in the storage root data; a job goes on by itself"),
        (errno.EDQUOT, "Free space"),
        (errno.EACCES, "right"),
        (errno.EROFS, "right"),
        (errno.EIO, "Input/output error"),
        (errno.ESTALE, "can't be used now"),
        (errno.ETIMEDOUT, "can't be used now"),
        (None, "can't be used now"),
    ],
)
def test_what_is_said_of_a_storage_at_fault(
    root: Path, number: int | None, text: str
) -> None:
    raised = OSError(number, "x", str(root)) if number else OSError(str(root))
    with pytest.raises(ServiceError, match=text) as error:
        with storage_errors(at(root, "x.zarr")):
            raise raised
    assert reason(error) == "STORAGE_UNAVAILABLE"
    assert error.value.__cause__ is raised


def test_other_errors_pass(root: Path) -> None:
    for raised in (ValueError("x"), ServiceError("SOURCE_UNREADABLE", "x")):
        with pytest.raises(type(raised)) as error, storage_errors(at(root, "x")):
            raise raised
        assert error.value is raised


def test_a_full_disk_and_then_a_mended_one(root: Path) -> None:
    location = at(root, "x.zarr")
    written(location)
    array = zarr.open_array(zarr_store(location, is_writable=True), mode="r+")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(ServiceError, match="Free space") as error:
            array[:] = np.random.default_rng(0).normal(size=(20, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reason(error) == "STORAGE_UNAVAILABLE"
    array[:] = 5.0
    assert np.asarray(array[:]).sum() == 300.0


@pytest.mark.parametrize("scheme", ["s3", "simplecache::s3", "no-such-thing"])
def test_a_file_system_that_is_not_installed(scheme: str) -> None:
    location = at(f"{scheme}://key:secret@bucket/srv", "x.zarr")
    uses = [open_file, identity, remove, lambda x: zarr_store(x, is_writable=False)]
    for use in uses:
        with pytest.raises(ServiceError, match="://") as error:
            use(location)
        assert reason(error) == "NOT_INSTALLED"
        assert scheme == "no-such-thing" or "Install s3fs" in error.value.message


class Unreachable(fsspec.AbstractFileSystem):
    """A storage whose network is down, whatever its package makes of that."""

    protocol = "unreachable"

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no route to key:secret@host")

    ls = info = _open = _rm = cat_file = pipe_file = _fail


def test_a_remote_storage_that_fails() -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    location = at("unreachable://srv", "x.zarr")
    store = zarr_store(location, is_writable=True)
    uses = [
        lambda: open_file(location),
        lambda: identity(location),
        lambda: remove(location),
        lambda: zarr.open(store, mode="r"),
        lambda: zarr.create_array(store, shape=3, dtype="f8"),
    ]
    for use in uses:
        with pytest.raises(ServiceError, match="RuntimeError") as error:
            use()
        assert reason(error) == "STORAGE_UNAVAILABLE"


def test_remove(anywhere: str) -> None:
    location, beside = at(anywhere, "a/x.zarr"), at(anywhere, "a/x.zarr2")
    written(location)
    put(beside, b"stays")
    for _ in range(2):
        remove(location)
        with pytest.raises(ServiceError, match="is not there"):
            identity(location)
    remove(at(anywhere, "none/at/all"))
    assert open_file(beside).read() == b"stays"
    remove(beside)
    with pytest.raises(ServiceError, match="is not there"):
        open_file(beside)


def test_remove_follows_no_link(root: Path) -> None:
    links(root)
    for path in ("folder", "file.npy", "dangling.npy", "good", "loop.npy"):
        remove(at(root, path))
        assert not os.path.lexists(root / path)
    with pytest.raises(ServiceError, match="by a link"):
        remove(at(root, "relative/secret.npy"))
    assert (root.parent / "outside" / "secret.npy").read_bytes() == b"secret"
    assert (root / "inside" / "x.npy").read_bytes() == b"inside"
