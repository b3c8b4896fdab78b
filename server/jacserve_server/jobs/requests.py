"""Jobs as clients ask for them: `JobSpec` messages, checked and fitted."""

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from google.protobuf.duration_pb2 import Duration

from jacserve import tensors
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve.vocabulary import DTYPES
from jacserve_server.errors import ServiceError
from jacserve_server.jobs import storage
from jacserve_server.jobs.plans import RowSource, Task
from jacserve_server.jobs.sources import open_source
from jacserve_server.jobs.storage import Location, locate, locate_again
from jacserve_server.messages import check_lengths, decode_query, placeholder
from jacserve_server.planning import Plan, plan
from jacserve_server.query import Query
from jacserve_server.signature import FunctionSpec
from jacserve_server.work import Work

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_LONGEST_TTL_S = 315_576_000_000  # The most that a Duration may hold.
_ID_RULE = "1 to 63 letters, digits, '-', '_' or '.', the first a letter or a digit"


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job that fits its function.

    Attributes:
        job_id: Its id.
        spec: The message, hollow, with the function's version and all defaults.
        task: What it is to do.
        require_finite: Whether NaN and Inf fail it.
        identities: Of the files that it reads, to see that they stay the same.
    """

    job_id: str
    spec: jobs_pb2.JobSpec
    task: Task
    require_finite: bool
    identities: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Returns it as the table keeps it; the same request is the same bytes."""
        spec = self.spec.SerializeToString(deterministic=True)
        kept = {"spec": spec.hex(), "identities": self.identities}
        return json.dumps(kept).encode()


def spec_of(kept: bytes) -> jobs_pb2.JobSpec:
    """Returns the message of a request that the table has kept."""
    return jobs_pb2.JobSpec.FromString(bytes.fromhex(json.loads(kept)["spec"]))


@contextmanager
def unchanged_files(kept: bytes, roots: Mapping[str, str]) -> Iterator[None]:
    """Checks, after it is fitted anew, that a request reads what it has read before.

    Args:
        kept: The request as the table has kept it.
        roots: The storage roots that may be read now.

    Raises:
        ServiceError: In place of whatever the block has raised: STORAGE_UNAVAILABLE
            where a file or its root is gone, SOURCE_UNREADABLE where a file has
            changed.
    """
    arrays = _arrays(spec_of(kept).query)
    named = [(field, array.source) for field, array in arrays if _is_named(array)]
    with ExitStack() as stack:
        identities = json.loads(kept)["identities"]
        for (field, source), identity in zip(named, identities, strict=True):
            location = locate_again(source.path, roots, field=f"{field}.source.path")
            stack.enter_context(storage.unchanged(location, source.array, identity))
        yield


def check_id(job_id: str) -> str:
    """Returns an id, a new one where there is none.

    Args:
        job_id: What a client gave.

    Returns:
        The id.

    Raises:
        ServiceError: It has a character that it must not have, or is too long.
    """
    if not job_id:
        return uuid.uuid4().hex
    if not _ID.fullmatch(job_id):
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"job_id is {job_id!r}. Pass {_ID_RULE}.",
            field="job_id",
            job_id=job_id,
        )
    return job_id


def id_of(name: str) -> str:
    """Returns the id in a job's resource name, which may be the bare id."""
    return name.removeprefix("jobs/")


def fit(
    spec: jobs_pb2.JobSpec,
    find: Callable[[str], FunctionSpec],
    roots: Mapping[str, str],
    uploads: Callable[[int], Location],
    output: Location,
    job: str,
    identity: str,
) -> JobRequest:
    """Fits a job to its function, and to the files that it names. It reads these.

    Args:
        spec: The message, hollow.
        find: Finds a function by name.
        roots: The storage roots that may be read.
        uploads: Where the query's tensors are, or will be: of the first, the second,
            and so on.
        output: Where the results go.
        job: The job's uid.
        identity: Whose turn at the device it takes; "" for one of its own.

    Returns:
        The request.

    Raises:
        ServiceError: It does not fit.
    """
    if spec.batch_size < 0:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"batch_size is {spec.batch_size}. Pass 1 or more, or 0 to have it "
            "measured.",
            field="batch_size",
            batch_size=spec.batch_size,
        )
    _check_ttl(spec.ttl)
    check_lengths(spec.query)  # Before as many files are opened.
    query_message, places = _with_shapes(spec.query, roots, uploads)
    query = decode_query(query_message, placeholder)
    _check_options(query)
    function = find(query.function)
    work, order = _fitted(query, replace(function, max_batch=None))
    if work.batch is None:
        raise ServiceError(
            "SHAPE_MISMATCH",
            f"no array has an axis of points. Pass arrays with one axis more than "
            f"{function.resource} declares, or evaluate one point without a job.",
            field="query.inputs",
            function=function.resource,
        )
    if work.batch == 0:
        raise ServiceError(
            "SHAPE_MISMATCH",
            "the job has no points. Pass at least one.",
            field="query.inputs",
        )
    settled = jobs_pb2.JobSpec()
    settled.CopyFrom(spec)
    settled.query.function = f"functions/{function.qualified_name}"
    sources = tuple(
        replace(places[place], is_batched=array.is_batched)
        for place, array in zip(order, work.computation.arrays, strict=True)
    )
    turn = identity or job
    task = Task(job, turn, work.computation, sources, work.batch, output)
    identities = tuple(place.identity for place in places if place.identity)
    return JobRequest(spec.job_id, settled, task, query.require_finite, identities)


def _with_shapes(
    query: pb.Query, roots: Mapping[str, str], uploads: Callable[[int], Location]
) -> tuple[pb.Query, list[RowSource]]:
    """Returns the query with tensors for its sources, and where all arrays are."""
    shaped = pb.Query()
    shaped.CopyFrom(query)
    places: list[RowSource] = []
    tensors_seen = 0
    for field, entry in _arrays(shaped):
        if _is_named(entry):
            if entry.HasField("tensor"):
                raise ServiceError(
                    "MALFORMED_REQUEST",
                    f"{field} has a tensor and a source. Pass one of them.",
                    field=field,
                )
            place = _located(entry.source, roots, f"{field}.source")
            _describe(entry.tensor, place, f"{field}.source")
            identity = storage.identity(place.location, place.array)
            place = replace(place, identity=identity)
            entry.ClearField("source")
        else:
            place = RowSource(uploads(tensors_seen), "", is_batched=False)
            tensors_seen += 1
        places.append(place)
    return shaped, places


def _is_named(entry: pb.Input | pb.Cotangent) -> bool:
    return entry.HasField("source")


def _arrays(query: pb.Query) -> Iterator[tuple[str, pb.Input | pb.Cotangent]]:
    groups: Sequence[tuple[str, Sequence[pb.Input] | Sequence[pb.Cotangent]]] = (
        ("inputs", query.inputs),
        ("tangents", query.tangents),
        ("cotangents", query.cotangents),
    )
    for name, entries in groups:
        for place, entry in enumerate(entries):
            yield f"query.{name}[{place}]", entry


def _located(source: pb.Source, roots: Mapping[str, str], field: str) -> RowSource:
    location = locate(source.path, roots, field=f"{field}.path")
    return RowSource(location, source.array, is_batched=False)


def _describe(tensor: pb.Tensor, place: RowSource, field: str) -> None:
    try:
        opened = open_source(place.location, place.array)
    except ServiceError as error:
        error.field = field
        raise
    opened.close()
    tensor.dtype = DTYPES[opened.dtype.name]
    tensor.shape.extend(opened.shape)
    tensor.streamed_bytes = math.prod(opened.shape) * opened.dtype.itemsize


def _check_ttl(ttl: Duration) -> None:
    if not (0 <= ttl.seconds <= _LONGEST_TTL_S and 0 <= ttl.nanos < 10**9):
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"ttl has {ttl.seconds} seconds and {ttl.nanos} nanos. Pass 0 to "
            f"{_LONGEST_TTL_S} seconds and 0 to 999999999 nanos, or leave it out.",
            field="ttl",
            seconds=ttl.seconds,
            nanos=ttl.nanos,
        )


def _check_options(query: Query) -> None:
    for name, is_set in (("exact", query.exact), ("patterns", bool(query.patterns))):
        if is_set:
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"query.{name} has no meaning in a job. Leave it out.",
                field=f"query.{name}",
            )


def _fitted(query: Query, function: FunctionSpec) -> tuple[Work, tuple[int, ...]]:
    """Plans a query of placeholders; returns which array comes where, too."""
    origins = {id(array): array for array in query.arrays}

    def convert(array: Array, dtype: str) -> Array:
        number = np.zeros((), tensors.dtype_named(dtype))
        made = np.broadcast_to(number, array.shape)
        origins[id(made)] = array
        return made

    work = plan(query, function, convert=convert)
    given = replace(work, arrays=tuple(origins[id(array)] for array in work.arrays))
    return work, Plan.of(given, query).order
