"""Arrays mapped in files: the numbers that were saved, and not in memory."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jacserve.mapped_files import map_npy, map_npz

ARRAYS: dict[str, np.ndarray] = {
    "x": np.arange(12.0).reshape(4, 3),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(4, 3)),
    "big_endian": np.arange(5, dtype=">i4"),
    "scalar": np.array(3.0),
    "none": np.zeros((0, 3)),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives(tmp_path: Path, save: Callable[..., Any]) -> None:
    save(tmp_path / "all.npz", **ARRAYS)
    found = map_npz(tmp_path / "all.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert isinstance(found[name], np.memmap) or not array.size
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_files(tmp_path: Path) -> None:
    for name, array in ARRAYS.items():
        np.save(tmp_path / f"{name}.npy", array)
        np.testing.assert_array_equal(map_npy(tmp_path / f"{name}.npy"), array)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def other_compression(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", b"no array")


def no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", b"no array")


def objects(path: Path) -> None:
    np.savez(path, x=np.array([None]))


def damaged(path: Path) -> None:
    np.savez_compressed(path, x=np.arange(1000.0))
    raw = bytearray(path.read_bytes())
    raw[100:110] = bytes(10)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "spoil", [cut_off, other_compression, no_array, objects, damaged]
)
def test_what_is_no_archive_of_arrays(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(3.0))
    spoil(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz can't be read"):
        map_npz(tmp_path / "x.npz")
