"""A Zarr store of which every use of a key is watched."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager
from typing import Self

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype


class GuardedStore(Store):
    """Another store, all of whose methods run in a context that checks the key."""

    def __init__(
        self,
        store: Store,
        guard: Callable[[str], AbstractContextManager[None]],
        *,
        is_whole: bool = False,
    ) -> None:
        """Takes a store.

        Args:
            store: The store.
            guard: Makes a context of a key, or of a prefix of keys, which is "" for
                all. It raises, or translates what is raised inside it.
            is_whole: Whether all chunks were written. One that is not there is an
                error then, and not one of fill values.
        """
        super().__init__(read_only=store.read_only)
        self._store = store
        self._guard = guard
        self._is_whole = is_whole

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuardedStore) and self._store == other._store

    def __hash__(self) -> int:
        return id(self._store)

    def __repr__(self) -> str:
        # The store's own has its address.
        return f"{type(self).__name__}({type(self._store).__name__})"

    def with_read_only(self, read_only: bool = False) -> Self:  # noqa: D102
        store = self._store.with_read_only(read_only)
        return type(self)(store, self._guard, is_whole=self._is_whole)

    async def _open(self) -> None:
        with self._guard(""):
            await self._store._ensure_open()
        await super()._open()

    def close(self) -> None:  # noqa: D102
        self._store.close()
        super().close()

    async def clear(self) -> None:  # noqa: D102
        with self._guard(""):
            await self._store.clear()

    async def get(  # noqa: D102
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        with self._guard(key):
            found = await self._store.get(key, prototype, byte_range)
            if found is None and self._is_whole and not _is_document(key):
                raise FileNotFoundError(key)
            return found

    async def get_partial_values(  # noqa: D102
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:  # noqa: D102
        with self._guard(key):
            return await self._store.exists(key)

    async def getsize(self, key: str) -> int:  # noqa: D102
        with self._guard(key):
            return await self._store.getsize(key)

    @property
    def supports_writes(self) -> bool:  # noqa: D102
        return self._store.supports_writes

    async def set(self, key: str, value: Buffer) -> None:  # noqa: D102
        self._check_writable()
        with self._guard(key):
            await self._store.set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:  # noqa: D102
        self._check_writable()
        with self._guard(key):
            await self._store.set_if_not_exists(key, value)

    @property
    def supports_deletes(self) -> bool:  # noqa: D102
        return self._store.supports_deletes

    async def delete(self, key: str) -> None:  # noqa: D102
        self._check_writable()
        with self._guard(key):
            await self._store.delete(key)

    async def delete_dir(self, prefix: str) -> None:  # noqa: D102
        self._check_writable()
        with self._guard(prefix):
            await self._store.delete_dir(prefix)

    @property
    def supports_listing(self) -> bool:  # noqa: D102
        return self._store.supports_listing

    async def list(self) -> AsyncIterator[str]:  # noqa: D102
        with self._guard(""):
            async for key in self._store.list():
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # noqa: D102
        with self._guard(prefix):
            async for key in self._store.list_prefix(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # noqa: D102
        with self._guard(prefix):
            async for key in self._store.list_dir(prefix):
                yield key


def _is_document(key: str) -> bool:
    return key.rpartition("/")[2] in {"zarr.json", ".zarray", ".zgroup", ".zattrs"}
