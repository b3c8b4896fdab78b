"""The server's settings: from flags, the environment or a TOML file, in that order."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from jacserve_server.callers import Scope


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
        insecure: Whether everybody may call who reaches the port, where that is not
            on loopback and there is neither TLS nor a file of tokens.
        tls_certificate: PEM file of the server's certificate, and of those between it
            and a root; None for no TLS.
        tls_key: PEM file of its key.
        tls_client_ca: PEM file of the authorities whose certificates clients must
            have; None for none.
        tls_client_scopes: What such clients may do, where there are no tokens.
        tls_client_age_s: Seconds after which a connection takes no more calls, so that
            its client shows its certificate again; after as many more it is closed. 0
            for never.
        tokens_file: File of tokens, one of which every call must have; None for none.
        open_health: Whether health also answers who has no token.
        open_reflection: Whether reflection does; else it needs the scope "read".
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
        max_connections: Connections that are open; more are closed at once.
        connection_idle_s: Seconds after which a connection without calls is closed;
            its client connects again when it calls.
        max_queries: Queries in flight; more are refused. One client may take a place
            only while it has fewer than are left.
        max_queued_bytes: Bytes in flight, of requests and of what results have beyond
            1 MiB; more are refused, and one client has its part, as of queries.
        max_identity_queries: The most queries in flight of one client; None for its
            part alone.
        max_identity_bytes: The most bytes in flight of one client; likewise.
        max_identity_streams: The most streams that one client may have open: sessions,
            uploads, watched jobs and results of jobs.
        max_identity_programs: The most compiled programs kept of those that one client
            was the first to ask for; None for any, though whoever has the most is the
            first to lose one.
        compile_budget_s: Seconds of compiling that one client may have in an hour, and
            at once; 0 for any.
        stream_idle_s: Seconds after which a stream is ended whose client neither sends
            what it has begun nor takes what it is sent.
        session_idle_s: Seconds after which a session is ended that is not used; 0 for
            never.
        max_rank: The most axes of an array in a query.
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
        max_identity_jobs: As many of one identity; None for what is left to others.
        max_running_jobs: Jobs that are computed at once, in turn.
        max_finished_jobs: Jobs kept that have ended; the oldest of whoever has the
            most goes first.
        max_upload_bytes: The most that the arrays of one job may take.
        job_ttl_s: Seconds for which a job is kept after it has ended.
        drain_delay_s: Seconds for which calls are still answered at shutdown while
            health says NOT_SERVING, so that load balancers can turn away first.
        grace_s: Seconds that running calls get to finish after that.
        log_level: How much is logged: "debug", with a line for each call, "info",
            "warning" or "error".
        log_format: "text" for a terminal, "json", or "auto" for whichever fits.
        metrics_host: Address to answer Prometheus on; anybody who reaches it may ask.
        metrics_port: TCP port to answer Prometheus on; 0 takes a free one, None has
            none.
        open_telemetry: Whether to send spans, as the OTEL_ environment has it.
    """

    model_config = SettingsConfigDict(
        # What is refused may be a password that was put in the wrong place.
        env_prefix="JACSERVE_",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    insecure: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tls_client_scopes: tuple[Scope, ...] = ("read", "compute", "jobs")
    tls_client_age_s: float = Field(default=3600.0, ge=0, le=1e6)
    tokens_file: Path | None = None
    open_health: bool = True
    open_reflection: bool = False
    device: Annotated[str, AfterValidator(_device)] = "auto"
    device_threads: int | None = Field(default=None, ge=1)
    shard_rows: int = Field(default=4096, ge=2)
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1)
    gpu_preallocate: bool | None = None
    compile_threads: int = Field(default=min(os.cpu_count() or 1, 2), ge=1)
    max_programs: int = Field(default=256, ge=1)
    max_streams: int = Field(default=256, ge=1)
    max_connections: int = Field(default=1000, ge=1)
    # gRPC's clients close theirs after half an hour, and those that a server closes
    # first write a line to stderr.
    connection_idle_s: float = Field(default=2400.0, gt=0, le=1e6)
    max_queries: int = Field(default=1024, ge=1)
    max_queued_bytes: int = Field(default=2**31, ge=2**10)
    max_identity_queries: int | None = Field(default=None, ge=1)
    max_identity_bytes: int | None = Field(default=None, ge=2**10)
    max_identity_streams: int = Field(default=128, ge=1)
    max_identity_programs: int | None = Field(default=None, ge=1)
    compile_budget_s: float = Field(default=600.0, ge=0)
    stream_idle_s: float = Field(default=60.0, gt=0)
    session_idle_s: float = Field(default=3600.0, ge=0)
    max_rank: int = Field(default=16, ge=0, le=32)
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
    # Their URLs may have passwords in them, as that of the table may.
    storage_roots: dict[str, str] = Field(default_factory=dict, repr=False)
    result_roots: dict[str, str] = Field(default_factory=dict, repr=False)
    jobs_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("jacserve") / "jobs"
    )
    jobs_database: str | None = Field(default=None, repr=False)
    max_jobs: int = Field(default=1000, ge=1)
    max_identity_jobs: int | None = Field(default=None, ge=1)
    max_running_jobs: int = Field(default=4, ge=1)
    max_finished_jobs: int = Field(default=1000, ge=0)
    max_upload_bytes: int = Field(default=2**36, ge=2**10)
    job_ttl_s: float = Field(default=7 * 86400.0, ge=0)
    drain_delay_s: float = Field(default=0.0, ge=0)
    grace_s: float = Field(default=30.0, ge=0)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    log_format: Literal["auto", "text", "json"] = "auto"
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    open_telemetry: bool = False

    @model_validator(mode="after")
    def _has_whole_pairs(self) -> "Config":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("pass tls_certificate and tls_key, or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

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
