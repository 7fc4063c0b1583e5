"""Workers that speak TLS: whom the gateway trusts, and by which certificate they know it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import trustme

from sapwood.base.errors import ConfigError
from sapwood.gateway.client import tls_context
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.config.listening import ListeningConfig
from tests.gateway.stubs import Bench, Running, Stub, bench


class Files:
    """PEM files of an authority, of a worker and of a gateway."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.authority)
        self.worker = str(folder / "worker.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(self.worker)
        self.gateway = str(folder / "gateway.pem")
        authority.issue_cert("gateway").private_key_and_cert_chain_pem.write_to_path(self.gateway)


async def status_of_worker(files: Files, **options: Any) -> int:
    """What a request through a gateway with these options is answered by a worker that wants to see
    a certificate."""
    stub = Stub("a")
    tls = ListeningConfig(port=0, ssl_certfile=files.worker, ssl_ca_certs=files.authority)
    async with (
        Running(stub, config=tls) as engine,
        bench(wait=False, disable_retries=True, disable_health_check=True, **options) as made,
    ):
        assert engine.url.startswith("https://")
        assert (await made.client.post("/workers", json={"url": engine.url})).status_code == 202
        await ready(made)
        return (await made.post()).status_code


async def ready(made: Bench) -> None:
    while not made.gateway.fleet.is_ready:
        await asyncio.sleep(0.005)


def test_both_sides_know_each_other(tmp_path: Path) -> None:
    files = Files(tmp_path)
    known = {"worker_certfile": files.gateway}
    trusted = {"worker_ca_certs": files.authority}
    assert asyncio.run(status_of_worker(files, **trusted, **known)) == 200
    assert asyncio.run(status_of_worker(files, **trusted)) == 502
    assert asyncio.run(status_of_worker(files, **known)) == 502


def test_files_that_cannot_be_used_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    for files in ((str(tmp_path / "none.pem"), None, None), (None, "missing.pem", None)):
        with pytest.raises(ConfigError, match="--worker-ca-certs"):
            tls_context(*files)
    with pytest.raises(ConfigError, match="--worker-certfile"):
        GatewayConfig(worker_keyfile="key.pem")
