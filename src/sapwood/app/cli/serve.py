"""`sapwood serve`."""

from __future__ import annotations

import click

from sapwood.app.cli.kinds import draws, refuse_for_painting, refuse_without_painting
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.app.serving.engine_start import start_engine_process
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.config.parallel import LOCAL
from sapwood.schema.config.server import ServerConfig


@click.command(cls=ConfigCommand)
@click.argument("name", required=False)
@config_options(ServerConfig, ObservabilityConfig, *COMPONENTS, PaintingConfig)
@click.pass_context
def serve(ctx: click.Context, name: str | None, asked: Asked) -> None:
    """Serve a model over HTTP: OpenAI's API, the native one, and a page to chat. A folder with
    model_index.json is a diffusion model: it draws pictures for /v1/images.

    NAME is the same as --model NAME.
    SIGTERM and Ctrl-C stop it after the open requests have ended.
    """
    asked = asked.with_model(name)
    server, observability = asked.build(ServerConfig), asked.build(ObservabilityConfig)
    if draws(asked):
        refuse_for_painting(asked)
        # Nothing of it is imported for a language model.
        from sapwood.app.painting.launch import serve_painting

        model = asked.build(ModelConfig)
        name = model.served_model_name or model.model
        painting = asked.build(PaintingConfig)
        ctx.exit(serve_painting(model.model, name, painting, server, observability))
    refuse_without_painting(asked)
    engine = asked.engine()
    if server.restart_engine and engine.parallel.enable_dp_attention:
        raise ConfigError(
            "--restart-engine does not go together with --enable-dp-attention: the engines cannot "
            "go on without each other; leave it out, and start the server again"
        )
    if server.grpc_mode and observability.enable_metrics:
        raise ConfigError(
            "--enable-metrics does not go together with --grpc-mode: metrics are shown by HTTP; "
            "ask GetLoads, or leave one of them out"
        )
    if engine.parallel.node_rank > 0:
        from sapwood.app.ranks.node import serve_node

        ctx.exit(serve_node(engine, log_level=server.log_level))
    if server.ray_address is not None and engine.parallel.placement == LOCAL:
        raise ConfigError("--ray-address is for --placement ray; give both or neither")
    is_here = engine.parallel.placement == LOCAL
    processes = [start_engine_process() for _ in range(engine.parallel.dp_size if is_here else 0)]
    # Imported while the engines' processes import torch.
    from sapwood.app.serving.launch import serve as serve_until_stopped

    ctx.exit(serve_until_stopped(engine, server, observability, processes=processes))
