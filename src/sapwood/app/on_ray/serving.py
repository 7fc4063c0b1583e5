"""`sapwood.serve_ray`: a model as a deployment of Ray Serve, which scales it and replaces it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from sapwood.app.cli.engine import fetch_with_bar
from sapwood.app.on_ray.library import load
from sapwood.app.serving.launch import body_limits_of, request_limits_of
from sapwood.app.serving.served_engines import ServedEngines
from sapwood.app.serving.services import build_services
from sapwood.base.errors import ConfigError
from sapwood.frontends.server import create_app
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.options import gather
from sapwood.schema.config.server import ServerConfig
from sapwood.schema.env import environment, home

MAX_ONGOING_REQUESTS = 1024
"""Calls that Ray Serve hands to a replica at a time; the engine has its own queue for them."""
TARGET_ONGOING_REQUESTS = 16


def serve_ray(
    model: str,
    *,
    min_replicas: int = 1,
    max_replicas: int | None = None,
    target_ongoing_requests: float = TARGET_ONGOING_REQUESTS,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Any:
    """An application for `ray.serve.run`: the HTTP API of `sapwood serve`, one engine per replica.

    model         catalogue name, hub repository id, or path, which every node can reach
    min_replicas  replicas that always run; with more `max_replicas`, Ray Serve adds and removes
                  some so that each has about `target_ongoing_requests` open calls
    num_cpus      cores of a replica; its engine has as many threads unless num_threads says so
    num_gpus      GPUs of a replica
    options       any option of `sapwood serve` that concerns the engine, such as max_total_tokens
    Raises        ConfigError for wrong options, and if Ray is not installed
    """
    serve = load("ray.serve")
    most = min_replicas if max_replicas is None else max_replicas
    if not 1 <= min_replicas <= most:
        raise ConfigError(
            f"min_replicas is {min_replicas} and max_replicas {most}; give 1 <= min <= max"
        )
    given = {"model": model, **options}
    if num_gpus == 0:
        given = {"num_threads": max(1, int(num_cpus))} | given
    values = gather(COMPONENTS, flags={}, env={}, file=given, file_name="serve_ray(…)")
    EngineConfig.of(values)  # what is wrong is told here, not in a replica's log
    scaling: dict[str, Any] = {"num_replicas": min_replicas}
    if most > min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": min_replicas,
                "max_replicas": most,
                "target_ongoing_requests": target_ongoing_requests,
            }
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="sapwood",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        **scaling,
    )
    return deployment.bind(values)


class Replica:
    """One replica: the API side in Ray's process, and an engine process that ends with it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, options: dict[str, Any]
    ) -> None:
        config = EngineConfig.of(options)
        files = await asyncio.to_thread(fetch_with_bar, config.model)
        self._engines = ServedEngines(config, home(environment()))
        try:
            await self._engines.until_ready()
        except BaseException:
            await self._engines.end()
            raise
        server = ServerConfig()
        services = build_services(
            self._engines.client, files, config, replicas=self._engines.replicas
        )
        self._app = create_app(
            replace(services, limits=request_limits_of(server)), body_limits=body_limits_of(server)
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Ray Serve starts another replica if this raises."""
        reason = self._engines.client.unavailable_reason
        if reason is not None:
            raise RuntimeError(f"the engine does not serve: {reason}")

    async def __del__(self) -> None:
        await self._engines.end()
