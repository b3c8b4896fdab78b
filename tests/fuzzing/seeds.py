"""Messages that are right, of many kinds: what mutations start from."""

from typing import Any

import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from fuzzing.wire import packed
from jacserve import tensors
from jacserve.queries import EvaluateOptions, QueryEncoder
from jacserve.streaming import head_part, parts, pieces
from jacserve.v1 import admin_pb2, jacobian_pb2 as pb, jobs_pb2
from jacserve.vocabulary import QUANTITIES

X = np.array([1.0, 2.0, 3.0])
_ALL: Any = tuple(QUANTITIES)
_encoder = QueryEncoder()


def query(
    function: str, inputs: Any, quantities: Any = "jacobian", **options: Any
) -> bytes:
    chosen: EvaluateOptions = options  # pyright: ignore[reportAssignmentType]
    return _encoder.encode(function, inputs, quantities, chosen).to_bytes()


def queries() -> list[bytes]:
    batch = np.arange(12.0).reshape(4, 3)
    z = np.array([1 + 2j, 3 - 1j])
    x2 = np.array([0.5, -2.0])
    both = ("value", "jacobian")
    mixed = (x2, np.array([1, 2]), np.array(True))
    nested = {"near": x2, "far": (x2, np.array(1.0))}
    seeds = [
        query("triple", X),
        query("triple@1", X, both),
        query("functions/triple@2", {"x": X}, both),
        query("five", X, both),
        query("nine", X, both),
        query("five", batch, both),
        query("seven", X, both, mode="forward"),
        query("seven", batch, "value", exact=True),
        query("triple", X, ("determinant", "abs_determinant", "slogdet")),
        query("triple", X, ("singular_values", "condition_number", "newton_step")),
        query("triple", X, "jvp", tangents=X),
        query("triple", X, "vjp", cotangents=np.stack([X, X])),
        query("total", X, ("gradient", "hessian", "hvp"), tangents=X),
        query("total", X, _ALL, tangents=X, cotangents=X[:1]),
        query("pair", (x2, x2), both, layout="blocks"),
        query("pair", {"y": x2, "x": x2}, "jacobian", wrt=["y"], mode="reverse"),
        query("pair", (x2, x2), "vjp", layout="blocks", cotangents=nested),
        query("mixed", mixed, both),
        query("turned", z, both),
        query("turned", z.astype(np.complex64), "value"),
        query("stencil", np.arange(8.0), "jacobian", mode="sparse"),
        query("stencil", np.arange(8.0), "jacobian", mode="sparse", layout="coo"),
        query("triple", X.astype(int), "value", cast=True),
        query("triple", X, "value", require_finite=True),
        query("triple", np.array([1.0, np.nan, np.inf]), "value"),
        query("triple", np.empty((0, 3)), "value"),
        query("pair", (np.ones((3, 2)), x2), "value"),
    ]
    seeds += [
        query("triple", X.astype(dtype), both)
        for dtype in ("float32", "float16", "bfloat16")
        if (dtype != "bfloat16" or tensors.dtype_named("bfloat16"))
        for dtype in [tensors.dtype_named(dtype)]
    ]
    return seeds


def streams() -> list[bytes]:
    """Streams of a query, packed."""
    batch = np.arange(12.0).reshape(4, 3)
    found = []
    for inputs, function in (
        ((X,), "triple"),
        ((batch,), "five"),
        ((X[:2],) * 2, "pair"),
    ):
        ask = _encoder.encode(function, inputs, "value", {})
        found.append(packed(list(ask.to_parts())))
        # As of a large query: a hollow head, then its pieces.
        head = head_part(ask.form.query)
        rows = list(map(tensors.bytes_of, ask.arrays))
        cut = [
            part
            for place, row in enumerate(rows)
            for part in (*pieces(place, 0, row[:8]), *pieces(place, 8, row[8:]))
        ]
        found.append(packed([head, *cut]))
    return found


def session_requests() -> list[bytes]:
    timeout = Duration(seconds=30, nanos=5)
    found = [
        pb.SessionRequest(
            id=place, timeout=timeout, query=pb.Query.FromString(raw)
        ).SerializeToString()
        for place, raw in enumerate(queries()[:12])
    ]
    found.append(pb.SessionRequest(id=3, cancel=True).SerializeToString())
    return found


def sparsity_requests() -> list[bytes]:
    requests = (
        pb.GetSparsityRequest(name="stencil"),
        pb.GetSparsityRequest(name="seven", sizes={"n": 5}, wrt=["x"]),
        pb.GetSparsityRequest(name="total", quantity=pb.QUANTITY_HESSIAN),
    )
    return [request.SerializeToString() for request in requests]


def jobs() -> list[bytes]:
    """The parts of CreateJob, packed."""
    batch = np.arange(12.0).reshape(4, 3)
    ask = _encoder.encode("triple", batch, ("value", "jacobian"), {})
    rows = list(map(tensors.bytes_of, ask.arrays))
    spec = jobs_pb2.JobSpec(
        job_id="night-1", query=ask.form.query, batch_size=2, ttl=Duration(seconds=1)
    )
    stored = pb.Query(function="triple", quantities=[pb.QUANTITY_VALUE])
    stored.inputs.add(source=pb.Source(path="data/points.npy", array="x"))
    elsewhere = jobs_pb2.JobSpec(job_id="b", query=stored, output="out/b.zarr")
    return [
        packed(list(parts(spec, rows))),
        packed([head_part(spec), *pieces(0, 0, rows[0])]),
        packed(list(parts(elsewhere, []))),
    ]


def job_calls() -> dict[str, list[bytes]]:
    """Requests of the other RPCs of jobs, by name."""
    named = [
        jobs_pb2.GetJobRequest(name=name, owner=owner).SerializeToString()
        for name in ("jobs/night-1", "night-1", "nobody")
        for owner in ("", "token:other")
    ]
    listed = jobs_pb2.ListJobsRequest(
        page_size=2, states=[jobs_pb2.JOB_STATE_SUCCEEDED], page_token="x"
    )
    read = jobs_pb2.ReadJobResultRequest(
        name="night-1", start=1, count=2, quantities=[pb.QUANTITY_VALUE]
    )
    return {
        "GetJob": named,
        "WatchJob": named,
        "CancelJob": named,
        "DeleteJob": named,
        "ListJobs": [b"", listed.SerializeToString()],
        "ReadJobResult": [read.SerializeToString(), *named],
    }


def function_calls() -> dict[str, list[bytes]]:
    """Requests of the RPCs that describe functions, by name."""
    page = pb.ListFunctionsRequest(page_size=3, page_token="1")
    return {
        "ListFunctions": [b"", page.SerializeToString()],
        "GetFunction": [
            pb.GetFunctionRequest(name=name).SerializeToString()
            for name in ("triple", "functions/triple@2", "nobody", "a@b@c")
        ],
        "GetSparsity": sparsity_requests(),
    }


def admin_calls() -> dict[str, list[bytes]]:
    """Requests of those who run the server, by name."""
    return {
        "GetStatus": [b"", admin_pb2.GetStatusRequest().SerializeToString()],
        "ReleaseFunction": [
            admin_pb2.ReleaseFunctionRequest(name=name).SerializeToString()
            for name in ("triple", "functions/triple@2", "nobody", "a@b@c", "")
        ],
    }


def results() -> list[bytes]:
    """Answers to queries, as servers send them."""
    found: list[pb.Result] = []
    for quantities in (("value",), ("value", "jacobian"), ("jacobian",)):
        for dtype in ("float64", "float32", "complex128"):
            result = pb.Result(
                finite=True, coalesced_count=1, function="functions/triple@1",
                device="cpu:0",
            )  # fmt: skip
            result.timing.execute_duration.nanos = 1000
            for place, name in enumerate(quantities):
                output = result.outputs.add(quantity=QUANTITIES[name])
                array = np.ones((3,) * (place + 1), dtype)
                tensors.encode_into(output.tensor, array)
            found.append(result)
    nested = pb.Result(function="functions/pair@1", bucket=4)
    for key in ("near", "far"):
        output = nested.outputs.add(quantity=pb.QUANTITY_VALUE)
        output.path.add(key=key)
        output.path.add(index=0)
        tensors.encode_into(output.tensor, np.ones(2))
    tensors.encode_into(nested.finite_points, np.array([True, False]))
    sparse = pb.Result(function="functions/stencil@1")
    pattern = sparse.patterns.add(hash="h", row_count=2, column_count=3)
    tensors.encode_into(pattern.columns, np.array([0, 1, 2], np.int32))
    tensors.encode_into(pattern.row_starts, np.array([0, 2, 3], np.int32))
    output = sparse.outputs.add(quantity=pb.QUANTITY_JACOBIAN, pattern="h")
    output.mode = pb.MODE_SPARSE
    tensors.encode_into(output.tensor, np.ones(3))
    whole = [each.SerializeToString() for each in (*found, nested, sparse)]
    # jacserve's servers put the timing first.
    timed = pb.Result(timing=found[0].timing, finite=True).SerializeToString()
    bare = pb.Result()
    bare.CopyFrom(found[1])
    bare.ClearField("timing")
    return [*whole, timed + bare.SerializeToString()]


def result_streams() -> list[bytes]:
    """Answers in parts, packed."""
    found: list[bytes] = []
    for raw in results():
        whole = pb.Result.FromString(raw)
        rows: list[np.ndarray] = []
        for tensor in (
            *(output.tensor for output in whole.outputs),
            *(t for p in whole.patterns for t in (p.columns, p.row_starts)),
            *([whole.finite_points] if whole.HasField("finite_points") else []),
        ):
            rows.append(np.frombuffer(tensor.data, np.uint8))
            tensor.streamed_bytes = len(rows[-1])
            tensor.ClearField("data")
        found.append(packed(list(parts(whole, rows))))
        cut = [part for place, row in enumerate(rows) for part in pieces(place, 0, row)]
        found.append(packed([head_part(whole), *cut]))
    return found


def statuses() -> list[bytes]:
    """Failures, as servers send them."""
    details = (
        error_details_pb2.ErrorInfo(
            reason="SHAPE_MISMATCH", domain="jacserve", metadata={"given": "[4]"}
        ),
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="jacserve"),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=5)),
        error_details_pb2.RequestInfo(request_id="r"),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field="x")]
        ),
    )
    status = status_pb2.Status(code=3, message="x has shape [4]")
    for detail in details:
        any_message = AnyMessage()
        any_message.Pack(detail)
        status.details.append(any_message)
    return [status.SerializeToString(), status_pb2.Status(code=8).SerializeToString()]


def session_responses() -> list[bytes]:
    failed = [
        pb.SessionResponse(id=2, error=status_pb2.Status.FromString(raw))
        for raw in statuses()
    ]
    answered = [
        pb.SessionResponse(id=1, result=pb.Result.FromString(raw))
        for raw in results()[:3]
    ]
    return [each.SerializeToString() for each in (*failed, *answered)]


def functions() -> list[bytes]:
    """Descriptions of functions, as servers send them."""
    function = pb.Function(
        name="functions/pair@1",
        documentation="What it is.",
        modes=[pb.MODE_FORWARD],
        preferred_mode=pb.MODE_AUTO,
        max_batch=8,
        sizes={"n": 3},
        quarantine_reason="it did not end",
    )
    argument = function.arguments.add(name="x", differentiable=True)
    argument.dtypes.append(pb.DTYPE_FLOAT64)
    argument.shape.add(size=2)
    argument.shape.add(symbol="2*n + 1")
    result = function.results.add()
    result.path.add(key="near")
    result.shape.add()
    function.missing_modes.add(mode=pb.MODE_REVERSE, reason="a loop")
    function.measured_strategies.add(
        inputs="x: float64[2]", wrt=["x"], bucket=4, mode=pb.MODE_FORWARD, speedup=2.0
    )
    return [function.SerializeToString()]


def sparsities() -> list[bytes]:
    sparsity = pb.Sparsity(color_count=2, mode=pb.MODE_FORWARD, inputs="u: float32[3]")
    sparsity.pattern.CopyFrom(pb.Result.FromString(results()[-2]).patterns[0])
    return [sparsity.SerializeToString()]


def job_infos() -> list[bytes]:
    job = jobs_pb2.Job(
        name="jobs/night-1",
        query=pb.Query(function="functions/triple@1", quantities=[pb.QUANTITY_VALUE]),
        state=jobs_pb2.JOB_STATE_RUNNING,
        error=status_pb2.Status.FromString(statuses()[0]),
        batch_size=4,
        chunk_size=8,
        output="results/x",
        create_time=Timestamp(seconds=1_700_000_000, nanos=5),
        end_time=Timestamp(seconds=1_700_000_100),
    )
    job.progress.point_count = 100
    job.progress.done_count = 50
    job.progress.first_non_finite = 3
    job.progress.points_per_second = 12.5
    job.progress.estimated_end_time.seconds = 1_700_000_050
    return [
        job.SerializeToString(),
        jobs_pb2.Job(name="x", state=jobs_pb2.JOB_STATE_QUEUED).SerializeToString(),
    ]
