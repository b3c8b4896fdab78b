"""What is installed: the names, the floors, the thin client and its wheel."""

import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import status_pb2
from grpc_tools import protoc

import jacserve
import jacserve_server
from jacserve.v1 import admin_pb2, jacobian_pb2 as pb, jobs_pb2
from jacserve_server import RunningServer

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", [jacserve, jacserve_server])
def test_public_names_are_sorted_and_there(package) -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__module__.startswith(package.__name__) or (
            name in {"JobState", "Layout", "Mode", "ModeOption", "Quantity"}
        )


def test_floors_are_those_of_the_generated_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(re.findall(r"([a-z-]+)>=([\d.]+)", " ".join(project["dependencies"])))
    generated = ROOT / "client" / "jacserve" / "v1"
    grpc_text = (generated / "jacobian_pb2_grpc.py").read_text()
    assert f"GRPC_GENERATED_VERSION = '{floors['grpcio']}'" in grpc_text
    protobuf_text = (generated / "jacobian_pb2.py").read_text()
    assert f"# Protobuf Python Version: {floors['protobuf']}" in protobuf_text


def test_the_base_dependencies_are_closed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", text)[0] for text in project["dependencies"]}
    assert names == {"numpy", "grpcio", "protobuf", "googleapis-common-protos"}


@pytest.mark.parametrize("name", ["jacobian", "jobs", "admin"])
def test_every_element_of_the_contract_is_documented(tmp_path: Path, name: str) -> None:
    output = tmp_path / "contract"
    proto = f"jacserve/v1/{name}.proto"
    well_known = files("grpc_tools") / "_proto"
    google = Path(status_pb2.__file__).parents[2]
    options = ["--include_source_info", f"--descriptor_set_out={output}"]
    assert not protoc.main(
        ["", f"-I{ROOT / 'proto'}", f"-I{well_known}", f"-I{google}", *options, proto]
    )
    [file] = FileDescriptorSet.FromString(output.read_bytes()).file
    documented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }

    def elements(message, path: tuple[int, ...]):
        for field, values in message.ListFields():
            # Fields, messages, enums, enum values, services, methods.
            if field.name not in {
                "message_type", "field", "enum_type", "value", "service", "method"
            }:  # fmt: skip
                continue
            for place, value in enumerate(values):
                here = (*path, field.number, place)
                yield value.name, here
                yield from elements(value, here)

    missing = [n for n, path in elements(file, ()) if path not in documented]
    assert not missing


def test_every_rpc_has_a_client_method() -> None:
    methods = {
        "ListFunctions": "functions",
        "GetFunction": "describe",
        "GetSparsity": "sparsity",
        "Evaluate": "evaluate",
        "EvaluateStream": "map",
        "Session": "session",
    }
    service = pb.DESCRIPTOR.services_by_name["JacobianService"]
    assert set(service.methods_by_name) == set(methods)
    for name in methods.values():
        assert callable(getattr(jacserve.Client, name))


def test_every_rpc_of_administrators_has_a_method() -> None:
    methods = {
        "GetStatus": (jacserve.Client.status, jacserve.AsyncClient.status),
        "ReleaseFunction": (jacserve.Client.release, jacserve.AsyncClient.release),
    }
    service = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
    assert set(service.methods_by_name) == set(methods)


def test_every_rpc_of_jobs_has_a_method() -> None:
    methods = {
        "CreateJob": jacserve.Client.submit_job,
        "GetJob": jacserve.Client.job,
        "ListJobs": jacserve.Client.jobs,
        "WatchJob": jacserve.Job.watch,
        "CancelJob": jacserve.Job.cancel,
        "DeleteJob": jacserve.Job.delete,
        "ReadJobResult": jacserve.Job.read,
    }
    service = jobs_pb2.DESCRIPTOR.services_by_name["JobService"]
    assert set(service.methods_by_name) == set(methods)


def test_every_quantity_has_a_shorthand_and_a_property() -> None:
    for quantity in pb.Quantity.keys()[1:]:
        name = quantity.removeprefix("QUANTITY_").lower()
        assert isinstance(getattr(jacserve.Result, name), property)
        assert callable(getattr(jacserve.Client, name))


def python(code: str, interpreter: str | Path = sys.executable) -> str:
    return subprocess.run(
        [interpreter, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_the_client_never_imports_jax() -> None:
    loaded = python("import jacserve, jacserve.commands, sys; print(*sys.modules)")
    roots = {name.partition(".")[0] for name in loaded.split()}
    assert roots.isdisjoint({"jax", "jaxlib", "jaxtyping", "jacserve_server"})


def test_the_client_imports_fast() -> None:
    code = (
        "import numpy, grpc, grpc.aio, time; start = time.perf_counter();"
        "import jacserve; print(time.perf_counter() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_registering_needs_no_jax_import_of_ours() -> None:
    loaded = python(
        "from jacserve_server import Registry; import sys; print(*sys.modules)"
    )
    assert "jax" not in loaded.split()


def test_the_wheel_alone_calls_a_server(server: RunningServer, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "clean", with_pip=False)
    clean = tmp_path / "clean" / "bin" / "python"
    subprocess.run([*pip, "--python", clean, "install", wheel], check=True)
    code = f"""
import importlib.util
import jacserve
assert not importlib.util.find_spec("jax")
with jacserve.Client({server.target!r}) as client:
    print(client.describe("polar").signature)
    print(client.jacobian("polar", [2.0, 0.0]).round() + 0.0)
"""
    assert python(code, clean).splitlines() == [
        "polar(x: [2]) -> [2]",
        "[[1. 0.]",
        " [0. 2.]]",
    ]
    command = clean.with_name("jacserve")
    bare = subprocess.run([command], capture_output=True, text=True, check=False)
    assert bare.returncode == 1
    assert 'pip install "jacserve[cli]"' in bare.stderr


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{version('jacserve')}]" in (ROOT / "CHANGELOG.md").read_text()
