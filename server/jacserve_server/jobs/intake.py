"""How jobs come in: heads and arrays from clients, fitted, written and recorded."""

import hashlib
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

from google.protobuf.message import DecodeError

from jacserve.framing import Hole
from jacserve.streaming import StreamError, read_head
from jacserve.v1 import jobs_pb2
from jacserve_server.catalog import Catalog
from jacserve_server.config import Config
from jacserve_server.errors import ServiceError
from jacserve_server.jobs import storage
from jacserve_server.jobs.folder import JobFolder
from jacserve_server.jobs.records import JobRecord, NewJob
from jacserve_server.jobs.requests import (
    JobRequest,
    check_id,
    fit,
    spec_of,
    unchanged_files,
)
from jacserve_server.jobs.results import occupied
from jacserve_server.jobs.storage import Location, locate, locate_again
from jacserve_server.jobs.table import JobTable
from jacserve_server.jobs.threads import InThread
from jacserve_server.jobs.uploads import Upload

_MOST_FIELDS = 20_000


class Intake:
    """Makes jobs of what clients send, and again of what the table has kept."""

    def __init__(
        self,
        catalog: Catalog,
        config: Config,
        folder: JobFolder,
        table: JobTable,
        *,
        in_pool: InThread,
        in_table: InThread,
    ) -> None:
        """Keeps its collaborators.

        Args:
            catalog: The functions.
            config: The settings.
            folder: Where the arrays of jobs go.
            table: Where jobs are recorded.
            in_pool: Calls what reads and writes files.
            in_table: Calls the table.
        """
        self._catalog = catalog
        self._config = config
        self._folder = folder
        self._table = table
        self._in_pool = in_pool
        self._in_table = in_table

    async def create(
        self, raws: AsyncIterator[bytes], identity: str
    ) -> tuple[JobRecord, bool]:
        """Creates a job, unless it is there.

        Args:
            raws: Serialized CreateJobRequests.
            identity: Who makes it.

        Returns:
            The job, and whether it is new.

        Raises:
            ServiceError: It can't be created.
        """
        raw = await anext(raws, None)
        if raw is None:
            raise _broken("it has no head. Send one, then the pieces.")
        try:
            part, holes = read_head(
                raw, jobs_pb2.CreateJobRequest, most_fields=_MOST_FIELDS
            )
        except (DecodeError, StreamError) as error:
            raise _broken(str(error) or "it is no message of the contract.") from error
        spec = part.head
        spec.job_id = check_id(spec.job_id)
        self._check_size(sum(hole.size for hole in holes))
        uid = uuid.uuid4().hex
        output = self._output(spec, uid, locate)
        request = await self._in_pool(self._fit, spec, uid, output, identity)
        digest = hashlib.sha256(request.to_bytes()).hexdigest()
        existing = await self._in_table(self._table.find, spec.job_id, identity)
        if existing is None:
            counts = await self._in_table(self._table.unfinished, identity)
            self._check_count(identity, *counts)
            await self._in_pool(_check_absent, output)
        elif not existing.digest.startswith(digest):
            raise _exists(spec.job_id)
        staged = self._folder.staged(uid)
        try:
            digest += await self._receive(raws, raw, holes, spec, staged)
            record, is_new = await self._in_table(
                self._keep, request, uid, digest, staged, identity
            )
        finally:
            await self._in_pool(shutil.rmtree, staged, True)
        if record.digest != digest:
            raise _exists(spec.job_id)
        return record, is_new

    async def restore(self, record: JobRecord) -> JobRequest:
        """Fits a job again that the table has kept.

        Args:
            record: The job.

        Returns:
            The request, as it was fitted when the job was made.

        Raises:
            ServiceError: It does not fit any more, or what it reads has changed; or,
                as STORAGE_UNAVAILABLE, what it reads or writes is not there now.
        """
        output = self.output(record)
        return await self._in_pool(self._refit, record, output)

    def output(self, record: JobRecord) -> Location:
        """Returns where the results of a job are."""
        return self._output(spec_of(record.request), record.uid, locate_again)

    def _refit(self, record: JobRecord, output: Location) -> JobRequest:
        with unchanged_files(record.request, self._config.storage_roots):
            spec = spec_of(record.request)
            return self._fit(spec, record.uid, output, record.identity)

    def _fit(
        self, spec: jobs_pb2.JobSpec, uid: str, output: Location, identity: str
    ) -> JobRequest:
        return fit(
            spec,
            lambda name: self._catalog.find(name).spec,
            self._config.storage_roots,
            lambda place: self._folder.upload(uid, place),
            output,
            uid,
            identity,
        )

    def _output(
        self, spec: jobs_pb2.JobSpec, uid: str, find: Callable[..., Location]
    ) -> Location:
        if not spec.output:
            return self._folder.results(uid)
        output = find(spec.output, self._config.result_roots, field="output")
        if not output.path.endswith(".zarr"):
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"output is {spec.output!r}. Name a Zarr store, such as "
                f'"{output.root_name}/{spec.job_id}.zarr".',
                field="output",
                output=spec.output,
            )
        return output

    async def _receive(
        self,
        raws: AsyncIterator[bytes],
        raw: bytes,
        holes: Sequence[Hole],
        spec: jobs_pb2.JobSpec,
        staged: Path,
    ) -> str:
        """Writes the arrays that come with a job; returns a hash of them."""
        query = spec.query
        given = [*query.inputs, *query.tangents, *query.cotangents]
        shapes = [each.tensor for each in given if not each.HasField("source")]
        try:
            upload = Upload(staged, shapes, raw, holes)
            try:
                await self._in_pool(upload.begin)
                async for part in raws:
                    if upload.feed(part):
                        await self._in_pool(upload.write)
                if not upload.is_complete:
                    raise _broken("it ends before its last piece. Send all of them.")
                return await self._in_pool(upload.finish)
            finally:
                upload.close()
        except StreamError as error:
            raise _broken(str(error)) from error
        except OSError as error:
            raise _folder_unavailable(error) from error

    def _keep(
        self, request: JobRequest, uid: str, digest: str, staged: Path, identity: str
    ) -> tuple[JobRecord, bool]:
        kept = self._folder.keep(staged, uid)
        is_new = False
        try:
            ttl_s = self._config.job_ttl_s
            if request.spec.HasField("ttl"):
                ttl = request.spec.ttl
                ttl_s = min(ttl_s, ttl.seconds + ttl.nanos / 1e9)
            task = request.task
            record, is_new = self._table.create(
                NewJob(
                    uid=uid,
                    job_id=request.job_id,
                    request=request.to_bytes(),
                    digest=digest,
                    function=task.computation.function,
                    point_count=task.point_count,
                    output=task.output.name,
                    ttl_s=ttl_s,
                    owner=self._folder.presence.id,
                    identity=identity,
                ),
                partial(self._check_count, identity),
            )
            return record, is_new
        finally:
            if not is_new:
                shutil.rmtree(kept, ignore_errors=True)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._config.max_upload_bytes:
            raise ServiceError(
                "QUERY_TOO_LARGE",
                f"the arrays of the job take {size_bytes} bytes, but this server takes "
                f"at most {self._config.max_upload_bytes}. Put them into a storage "
                "root of the server and name that, or raise its max_upload_bytes.",
                query_bytes=size_bytes,
                max_query_bytes=self._config.max_upload_bytes,
            )

    def _check_count(self, identity: str, own: int, waiting: int) -> None:
        """Raises ServiceError where as many jobs wait as may: of one, or of all."""
        if waiting >= self._config.max_jobs:
            raise ServiceError(
                "TOO_MANY_JOBS",
                f"{waiting} jobs are queued or running, and this server keeps at most "
                f"{self._config.max_jobs}. Wait for some to end, or cancel them.",
                jobs=waiting,
                max_jobs=self._config.max_jobs,
            )
        most = self._config.max_identity_jobs
        if most is None and identity:
            # As of queries: whoever comes next finds room.
            most = self._config.max_jobs - waiting
        if most is not None and own >= most:
            raise ServiceError(
                "TOO_MANY_JOBS",
                f"{own} of your jobs are queued or running, and this server keeps at "
                f"most {most} of one identity now. Wait for some to end, or cancel "
                "them.",
                jobs=own,
                max_jobs=most,
            )


def _check_absent(output: Location) -> None:
    try:
        is_there = storage.exists(output)
    except ServiceError as error:
        error.field = "output"
        raise
    if is_there:
        raise occupied(output)


def _folder_unavailable(error: OSError) -> ServiceError:
    cause = error.strerror or type(error).__name__
    return ServiceError(
        "STORAGE_UNAVAILABLE",
        f"the server's folder of jobs can't be written: {cause}. Mend it, "
        "and submit the job again.",
    )


def _broken(problem: str) -> ServiceError:
    return ServiceError("STREAM_BROKEN", f"the stream is broken: {problem}")


def _exists(job_id: str) -> ServiceError:
    return ServiceError(
        "JOB_ALREADY_EXISTS",
        f"there is another job of the id {job_id}: of another function, with other "
        "options or other points. Take another id, or delete that job.",
        field="job_id",
        job=f"jobs/{job_id}",
    )
