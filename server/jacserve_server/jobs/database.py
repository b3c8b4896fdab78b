"""Connections to the database that keeps the table of jobs: SQLite or PostgreSQL.

Everything that a database raises leaves here as a TableError, whose text has neither
addresses nor passwords, so that it may be shown to anyone.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, TimeoutError as PoolTimeout

# How long one server waits for another that writes.
_PATIENCE_S = 10
# How a transaction of SQLite begins. In its WAL mode nothing that is committed is lost
# with the process. Only "durable" also waits for the disk, as for the loss of power.
_BEGINNINGS = {
    "reading": ("BEGIN",),
    "durable": ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),
    "fast": ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"),
}


class TableError(Exception):
    """The table of jobs can't be used: now, or, where its text says so, at all."""


class Database:
    """Transactions in one database. May be used from several threads."""

    def __init__(self, url: str) -> None:
        """Makes ready to connect; a file of SQLite is made where there is none.

        Args:
            url: "sqlite:///PATH" or "postgresql://USER:PASSWORD@HOST/NAME".

        Raises:
            TableError: The URL is of no use, or the file can't be opened.
        """
        parsed = _parsed(url)
        self.dialect = parsed.get_backend_name()
        make = _sqlite if self.dialect == "sqlite" else _postgresql
        try:
            self._engine = make(parsed)
        except ModuleNotFoundError as error:
            raise TableError(
                f"the table of jobs in PostgreSQL needs {error.name}, which is not "
                "installed. Run: pip install 'jacserve[postgres]'."
            ) from error
        if self.dialect == "sqlite":
            with _as_table_errors():
                _switch_to_wal(self._engine)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Opens a transaction that reads.

        Yields:
            Its connection.

        Raises:
            TableError: The database has failed.
        """
        with _as_table_errors(), self._beginning("reading").begin() as connection:
            yield connection

    @contextmanager
    def writing(self, *, is_durable: bool = True) -> Iterator[Connection]:
        """Opens a transaction that writes, one at a time in SQLite.

        Args:
            is_durable: Whether it must survive a loss of power. It survives the end of
                this process in any case.

        Yields:
            Its connection.

        Raises:
            TableError: The database has failed; nothing is written, except perhaps
                where the connection was lost while the transaction was committed.
        """
        kind = "durable" if is_durable else "fast"
        with _as_table_errors(), self._beginning(kind).begin() as connection:
            yield connection

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def _beginning(self, kind: str) -> Engine:
        return self._engine.execution_options(jacserve_kind=kind)


def _parsed(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # Without its cause, which may quote a password.
        raise TableError(
            "the URL of the table of jobs can't be read. Use sqlite:///PATH or "
            "postgresql://USER:PASSWORD@HOST/NAME."
        ) from None
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise TableError(
            f"the table of jobs can't be kept by {url.drivername}. Use "
            "sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME."
        )
    if not url.database or ":memory:" in url.database or "mode" in url.query:
        raise TableError(
            "the table of jobs must outlive the server, and memory does not. Name a "
            "file: sqlite:///PATH."
        )
    return url


def _sqlite(url: URL) -> Engine:
    patience = {} if "timeout" in url.query else {"timeout": _PATIENCE_S}
    engine = create_engine(url, connect_args=patience, hide_parameters=True)

    # Transactions are begun here and not by the driver, which does so too late, and for
    # reading first: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        kind = connection.get_execution_options()["jacserve_kind"]
        for statement in _BEGINNINGS[kind]:
            connection.exec_driver_sql(statement)

    return engine


def _switch_to_wal(engine: Engine) -> None:
    """Has a file of SQLite keep a write-ahead log, from now on."""
    deadline = time.monotonic() + _PATIENCE_S
    connection = engine.raw_connection()
    try:
        while True:
            try:
                connection.cursor().execute("PRAGMA journal_mode=WAL").close()
                return
            except sqlite3.OperationalError as error:
                # SQLite itself does not wait here for another that does the same.
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    finally:
        connection.close()


def _postgresql(url: URL) -> Engine:
    patience = {} if "connect_timeout" in url.query else {"connect_timeout": 10}
    # What was idle is tried before it is used: the database may have restarted.
    engine = create_engine(
        url, connect_args=patience, hide_parameters=True, pool_pre_ping=True
    )

    # A server that is stopped within a transaction must not stop the others.
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        for name in ("lock_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(f"SET {name} = '{_PATIENCE_S}s'")
        connection.commit()

    return engine


@contextmanager
def _as_table_errors() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise TableError(
            "the table of jobs can't be used now: all connections are busy."
        ) from error
    except (DBAPIError, sqlite3.Error) as error:
        origin = error.orig if isinstance(error, DBAPIError) else error
        raise TableError(
            f"the table of jobs can't be used now: {_reason(origin)}."
        ) from error


def _reason(origin: BaseException | None) -> str:
    if isinstance(origin, sqlite3.Error):
        return str(origin)  # such as "database is locked": never a path
    # The text of PostgreSQL's may have addresses and names of users.
    state = getattr(origin, "sqlstate", None)
    return type(origin).__name__ + (f" (SQLSTATE {state})" if state else "")
