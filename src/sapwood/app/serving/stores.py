"""The stores of `sapwood serve` for data that outlives a request, and the runner of batches."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from sapwood.base.errors import ConfigError
from sapwood.frontends.batches.runner import BatchRunner
from sapwood.frontends.batches.store import BatchStore
from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.server import Stores, inner_app
from sapwood.frontends.serving.services import Services
from sapwood.http.in_process import in_process
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.config.server import ServerConfig

log = logging.getLogger(__name__)


def open_stores(server: ServerConfig, home: Path, model_name: str) -> Stores:
    """The stores that the server's options describe.

    home    folder of the state unless --state-dir names another; if it is not writable, responses
            are kept in memory, and there are no batches
    Raises  ConfigError if --state-dir was given and cannot be used
    """
    directory = Path(server.state_dir) if server.state_dir else home / "state" / _plain(model_name)
    try:
        return _open(server, directory.expanduser().absolute())
    except ConfigError as error:
        if server.state_dir or server.file_storage_path:
            raise
        log.warning("%s. Responses are kept in memory, and there are no batches", error)
        days = server.responses_retention
        is_wanted = server.responses_store != "none"
        return Stores(responses=ResponseStore(None, retention_days=days) if is_wanted else None)


def batch_runner(
    server: ServerConfig, scheduler: SchedulerConfig, services: Services, stores: Stores
) -> BatchRunner | None:
    """The runner of batches, which does nothing before `run`; None: the server keeps no batches."""
    if stores.batches is None:
        return None
    gap = server.batch_priority_gap
    low_first = scheduler.schedule_low_priority_values_first
    return BatchRunner(
        stores.batches,
        services,
        in_process(inner_app(services, stores=stores)),
        concurrency=server.batch_concurrency,
        priority=scheduler.default_priority_value + (gap if low_first else -gap),
    )


def _open(server: ServerConfig, directory: Path) -> Stores:
    files = Path(server.file_storage_path) if server.file_storage_path else directory
    kept = files.expanduser().absolute()
    batches = BatchStore(kept) if server.batch_concurrency else None
    responses = None
    if server.responses_store != "none":
        kept_in = directory if server.responses_store == "sqlite" else None
        try:
            responses = ResponseStore(kept_in, retention_days=server.responses_retention)
        except ConfigError:
            if batches is not None:
                batches.close()
            raise
    return Stores(responses=responses, batches=batches)


def _plain(model_name: str) -> str:
    """The model's name as the name of a directory, without anything that could lead elsewhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", model_name).strip("._") or "model"
