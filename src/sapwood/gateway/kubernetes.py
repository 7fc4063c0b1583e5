"""The pods of a cluster, by Kubernetes' own client. Nothing else here knows that library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from kubernetes.aio import client, config, watch

from sapwood.base.errors import ConfigError
from sapwood.gateway.discovery import DiscoveryFailure, Pod

LIST_TIMEOUT_S = 30.0
WATCH_S = 30
"""After so long the list is read again, so that nothing missed stays missed."""
SLACK_S = 15.0
_FAILURES = (
    aiohttp.ClientError,
    client.ApiException,
    OSError,
    TimeoutError,
    ValueError,
    KeyError,
    TypeError,
)
"""What the library raises for an API server that cannot be reached, refuses, or talks nonsense."""


@asynccontextmanager
async def open_cluster(env: Mapping[str, str]) -> AsyncIterator[client.CoreV1Api]:
    """The cluster that the gateway runs in, or else the one that $KUBECONFIG names.

    Raises ConfigError if there is none."""
    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in env:
            config.load_incluster_config(client_configuration=settings)
        else:
            await config.load_kube_config(
                config_file=env.get("KUBECONFIG"), client_configuration=settings
            )
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            f"--service-discovery finds no cluster: {error}; run the gateway in a pod, or name the "
            "cluster's file in KUBECONFIG"
        ) from error
    async with client.ApiClient(settings) as api:
        yield client.CoreV1Api(api)


class ClusterPods:
    """Pods (discovery.py) of one namespace, or of all.

    selector  labels, as "app=engine,tier=gpu"
    """

    def __init__(self, cluster: client.CoreV1Api, selector: str, namespace: str | None) -> None:
        self._cluster = cluster
        self._asked: dict[str, Any] = {"label_selector": selector}
        # Raw answers: pods have many fields that the library would check, and three are needed.
        if namespace is None:
            self._list = cluster.list_pod_for_all_namespaces
            self._list_raw = cluster.list_pod_for_all_namespaces_without_preload_content
        else:
            self._asked["namespace"] = namespace
            self._list = cluster.list_namespaced_pod
            self._list_raw = cluster.list_namespaced_pod_without_preload_content

    async def listed(self) -> tuple[list[Pod], str]:
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                answer = await self._list_raw(**self._asked)
                async with answer:
                    body = await answer.read()
            if answer.status != 200:
                raise DiscoveryFailure(f"the list of pods was answered with {answer.status}")
            told = orjson.loads(body)
            return list(told["items"]), str(told["metadata"]["resourceVersion"])
        except _FAILURES as error:
            raise _failure(error) from error

    async def changes(self, version: str) -> AsyncIterator[tuple[str, Pod]]:
        try:
            async with (
                asyncio.timeout(WATCH_S + SLACK_S),
                watch.Watch(return_type="object") as watched,
            ):
                events = watched.stream(
                    self._list, resource_version=version, timeout_seconds=WATCH_S, **self._asked
                )
                async for event in events:
                    if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                        yield event["type"], event["raw_object"]
        except _FAILURES as error:
            raise _failure(error) from error


def _failure(error: Exception) -> DiscoveryFailure:
    return DiscoveryFailure(f"the cluster's API server failed: {error or type(error).__name__}")
