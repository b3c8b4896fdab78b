"""The tables that keep jobs, and their version.

One database may serve several folders of jobs: every row of a job names its folder.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    func,
    insert,
    not_,
    select,
)

from jacserve_server.jobs.database import TableError

VERSION = 1
# Any number that other users of the same PostgreSQL are unlikely to lock.
_LOCK = 0x6A61637365727665

_metadata = MetaData()
_versions = Table(
    "jacserve_schema",
    MetaData(),
    Column("version", Integer, primary_key=True, autoincrement=False),
)
jobs = Table(
    "jacserve_jobs",
    _metadata,
    Column("uid", String, primary_key=True),
    Column("folder", String, nullable=False),
    Column("identity", String, nullable=False),
    Column("job_id", String, nullable=False),
    Column("state", String, nullable=False),
    Column("request", LargeBinary, nullable=False),
    Column("digest", String, nullable=False),
    Column("function", String, nullable=False),
    Column("point_count", BigInteger, nullable=False),
    Column("batch_size", BigInteger),
    Column("chunk_size", BigInteger),
    Column("done_count", BigInteger, nullable=False, default=0),
    Column("ready_count", BigInteger, nullable=False, default=0),
    Column("non_finite_count", BigInteger, nullable=False, default=0),
    Column("first_non_finite", BigInteger),
    Column("points_per_s", Double, nullable=False, default=0.0),
    Column("execute_s", Double, nullable=False, default=0.0),
    Column("error", LargeBinary),
    Column("output", String, nullable=False),
    Column("fingerprint", String),
    Column("owner", String),
    Column("attempts", Integer, nullable=False, default=0),
    Column("strikes", Integer, nullable=False, default=0),
    Column("retry_at", Double),
    Column("ttl_s", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("updated_at", Double, nullable=False),
    Column("ended_at", Double),
    # Deleted for its clients, and waiting for its files to be.
    Column("is_condemned", Boolean, nullable=False, default=False),
)
chunks = Table(
    "jacserve_chunks",
    _metadata,
    Column("uid", String, primary_key=True),
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("rows", BigInteger, nullable=False),
    Column("non_finite", BigInteger, nullable=False),
    Column("first_non_finite", BigInteger),
    Column("execute_s", Double, nullable=False),
    # The boot of the machine whose memory may hold it still; NULL once it is on a disk.
    Column("boot", String),
)

# An id is taken until its job is deleted; everybody has ids of their own.
IS_TAKEN = not_(jobs.c.is_condemned)
Index(
    "jacserve_job_ids",
    jobs.c.folder,
    jobs.c.identity,
    jobs.c.job_id,
    unique=True,
    sqlite_where=IS_TAKEN,
    postgresql_where=IS_TAKEN,
)
Index("jacserve_job_order", jobs.c.folder, jobs.c.created_at, jobs.c.uid)


def prepare(connection: Connection) -> None:
    """Makes the tables where there are none.

    Args:
        connection: In a transaction that writes.

    Raises:
        TableError: They are of a newer version than this program knows.
    """
    if connection.dialect.name == "postgresql":
        # It checks whether a table is there, and then makes it: one server at a time.
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    _versions.create(connection, checkfirst=True)
    found = connection.scalar(select(func.max(_versions.c.version)))
    if found is not None and found > VERSION:
        raise TableError(
            f"the table of jobs has version {found}, and this server knows versions up "
            f"to {VERSION}. Update the server, or name another database."
        )
    if found is None:
        connection.execute(insert(_versions).values(version=VERSION))
    _metadata.create_all(connection)
