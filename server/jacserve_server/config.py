"""The server's settings: from flags, the environment or a TOML file, in that order."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import AfterValidator, Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


def _device(name: str) -> str:
    if not re.fullmatch(r"[a-z]+(:\d+(,\d+)*)?", name):
        raise ValueError(
            "pass auto, a platform such as cpu, or devices such as gpu:0,1"
        )
    return name


class Config(BaseSettings):
    """How a server runs.

    Each setting is read from an argument, else from the environment as JACSERVE_
    and its name in capitals, else from the TOML file, else its default holds.

    Attributes:
        host: Address to listen on; loopback unless told otherwise.
        port: TCP port; 0 takes a free one.
        device: "auto", a platform such as "cpu" or "gpu" for its first device, or
            devices by number, such as "gpu:1" or "gpu:0,1".
        device_threads: Programs that may run at once on each device; None for 2 on a
            GPU, and on a CPU for its cores, at most 4.
        compile_threads: Programs that may be compiled at once.
        shard_rows: Batches of at least this many points are divided among devices,
            where there are several.
        gpu_memory_fraction: The part of a GPU's memory that JAX may take; None for
            its default, 0.75.
        gpu_preallocate: Whether JAX takes that memory at once; None for its default,
            which is to do so.
        max_programs: Compiled programs kept for each device; the least recently used
            goes first.
        max_streams: Calls that one connection may have open at once; further ones
            wait in the client.
        max_queries: Queries in flight; more are refused. One client may take a place
            only while it has fewer than are left.
        max_queued_bytes: Bytes in flight, of requests and of what results have beyond
            1 MiB; more are refused, and one client has its part, as of queries.
        max_coalesced: Waiting points that may be computed together; 1 for none.
        max_payload_bytes: The most that the arrays of one query may take, and those
            of one result.
        max_program_bytes: Device memory that one program may take, with arguments,
            results and intermediates; None for 3/4 of what there is.
        isolation: Where functions run: "process" for all of them in a worker process,
            "none" for those there that say so themselves.
        max_execute_s: Seconds that one execution in a worker may take.
        max_compile_s: Seconds that it may take there to make one program.
        cache_dir: Folder for what outlives the process: compiled programs, measured
            strategies.
        max_cache_bytes: Compiled programs kept in it; 0 keeps none.
        storage_roots: What jobs may read: names, each of a folder or of a URL that
            fsspec opens.
        result_roots: Where jobs may write, if their clients say so; likewise.
        jobs_dir: Folder for jobs: uploaded points, results that have no other place,
            and the table of jobs. Servers that share it share its jobs.
        jobs_database: The table of jobs, in PostgreSQL by URL; None for SQLite, in
            jobs_dir.
        max_jobs: Jobs that are queued or running; more are refused.
        max_running_jobs: Jobs that are computed at once, in turn.
        max_finished_jobs: Jobs kept that have ended; the oldest goes first.
        max_upload_bytes: The most that the arrays of one job may take.
        job_ttl_s: Seconds for which a job is kept after it has ended.
        grace_s: Seconds that running calls get to finish at shutdown.
        log_level: How much is logged: "debug", "info", "warning" or "error".
    """

    model_config = SettingsConfigDict(
        env_prefix="JACSERVE_", frozen=True, extra="forbid"
    )

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    device: Annotated[str, AfterValidator(_device)] = "auto"
    device_threads: int | None = Field(default=None, ge=1)
    shard_rows: int = Field(default=4096, ge=2)
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1)
    gpu_preallocate: bool | None = None
    compile_threads: int = Field(default=min(os.cpu_count() or 1, 2), ge=1)
    max_programs: int = Field(default=256, ge=1)
    max_streams: int = Field(default=256, ge=1)
    max_queries: int = Field(default=1024, ge=1)
    max_queued_bytes: int = Field(default=2**31, ge=2**10)
    max_coalesced: int = Field(default=64, ge=1)
    max_payload_bytes: int = Field(default=2**30, ge=2**10)
    max_program_bytes: int | None = Field(default=None, ge=2**20)
    isolation: Literal["none", "process"] = "none"
    max_execute_s: float = Field(default=60.0, gt=0)
    max_compile_s: float = Field(default=300.0, gt=0)
    cache_dir: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("jacserve") / "1"
    )
    max_cache_bytes: int = Field(default=2**30, ge=0)
    storage_roots: dict[str, str] = Field(default_factory=dict)
    result_roots: dict[str, str] = Field(default_factory=dict)
    jobs_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("jacserve") / "jobs"
    )
    jobs_database: str | None = Field(default=None, repr=False)
    max_jobs: int = Field(default=1000, ge=1)
    max_running_jobs: int = Field(default=4, ge=1)
    max_finished_jobs: int = Field(default=1000, ge=0)
    max_upload_bytes: int = Field(default=2**36, ge=2**10)
    job_ttl_s: float = Field(default=7 * 86400.0, ge=0)
    grace_s: float = Field(default=30.0, ge=0)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    @staticmethod
    def load(path: Path | None = None, **arguments: Any) -> "Config":
        """Gathers the settings.

        Args:
            path: A TOML file of settings, or None.
            **arguments: Settings that go before all others; None counts as not
                given.

        Returns:
            The settings.

        Raises:
            pydantic.ValidationError: A setting is unknown or has no valid value.
            OSError: The file can't be read.
            tomllib.TOMLDecodeError: The file is not TOML.
        """
        if path is not None:
            # A file that is not there would pass for an empty one.
            path.open("rb").close()

        class Loaded(Config, toml_file=path):
            pass

        return Loaded(**{k: v for k, v in arguments.items() if v is not None})

    @classmethod
    def settings_customise_sources(  # noqa: D102
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)
