"""Finds the gateway's workers, as its options say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

from sapwood.base.errors import ConfigError
from sapwood.gateway.discovery import Discovery
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.worker import WorkerType
from sapwood.schema.config.gateway import GatewayConfig


@asynccontextmanager
async def found_workers(
    config: GatewayConfig, fleet: Fleet, env: Mapping[str, str]
) -> AsyncIterator[None]:
    """Inside the block the fleet follows the cluster's pods, if it is to.

    env     the process's environment, which may name the cluster ($KUBECONFIG)
    Raises  ConfigError if there is no cluster, or if its client library is not installed
    """
    if not config.service_discovery:
        yield
        return
    try:
        from sapwood.gateway.kubernetes import ClusterPods, open_cluster
    except ImportError as error:
        raise ConfigError(
            "--service-discovery needs the package kubernetes; install it with "
            "`pip install 'kubernetes>=37'`"
        ) from error
    async with open_cluster(env) as cluster:
        tasks = []
        for kind, selector in config.selectors.items():
            pods = ClusterPods(cluster, selector, config.service_discovery_namespace)
            discovery = Discovery(
                fleet,
                pods,
                kind=cast(WorkerType, kind),
                port=config.service_discovery_port,
                api_key=config.worker_api_key,
            )
            tasks.append(asyncio.create_task(discovery.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
