"""Builds the executor of an engine whose model makes embeddings or scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sapwood.app.loading import LoadWatch, dense_weight_dtype, fill, linear_scheme, timed
from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.executor.pooling_runner import PoolingModel, PoolingRunner
from sapwood.executor.rows import RowTable
from sapwood.kernels.interface import DTYPES, KV_CACHE_DTYPES, Kernels
from sapwood.layers.pooling import Pooler
from sapwood.memory.buffers import allocate_kv_caches
from sapwood.models.config import DecoderConfig
from sapwood.models.encoder.bert import Encoder
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.encoder.decoder import PooledDecoder
from sapwood.models.encoder.heads import decoder_head, encoder_head
from sapwood.models.registry import ARCHITECTURES
from sapwood.models.store import ModelFiles
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import ModelFacts
from sapwood.schema.pooling import Pooling

Shape = DecoderConfig | EncoderConfig


def read_shape(hf_config: Mapping[str, Any], pooling: Pooling | None) -> Shape:
    """The sizes of the model; ConfigError if its architecture is not implemented."""
    if pooling is None:
        return DecoderConfig.from_hf(hf_config)
    if pooling.decoder is None:
        return EncoderConfig.from_hf(hf_config, max_tokens=pooling.max_tokens)
    # With tied embeddings there is no output layer to be loaded.
    as_decoder = {**hf_config, "architectures": [pooling.decoder], "tie_word_embeddings": True}
    return DecoderConfig.from_hf(as_decoder)


def encoder_facts(
    files: ModelFiles, shape: EncoderConfig, dtype: str, weight_format: str
) -> ModelFacts:
    return ModelFacts(
        name=files.name,
        context_length=shape.context_length,
        max_context_length=shape.num_positions,
        dtype=dtype,
        num_parameters=shape.num_parameters,
        num_embedding_parameters=shape.vocab_size * shape.hidden_size,
        weight_format=weight_format,
        whole_prompts=True,
    )


def build_pooling_runner(
    config: EngineConfig,
    files: ModelFiles,
    shape: Shape,
    pooling: Pooling,
    kernels: Kernels,
    watch: LoadWatch,
) -> PoolingRunner:
    """Build the runner; `config` must be resolved."""
    assert config.execution.device is not None
    assert config.execution.num_threads is not None
    assert config.memory.page_size is not None
    assert config.memory.max_total_tokens is not None
    assert config.model.context_length is not None
    assert config.scheduler.max_running_requests is not None
    device = torch.device(config.execution.device)
    dtype = DTYPES[config.model.dtype]
    page_size = config.memory.page_size
    num_rows = config.scheduler.max_running_requests
    model = load_pooling_model(
        config, files, shape, pooling, kernels, device=device, dtype=dtype, watch=watch
    )
    watch.beat("allocating the KV pool")
    with timed("KV pool"):
        kv_caches = allocate_kv_caches(
            num_layers=0 if pooling.is_encoder else shape.num_layers,
            num_pages=config.memory.max_total_tokens // page_size,
            num_kv_heads=shape.num_kv_heads,
            page_size=page_size,
            head_dim=shape.head_dim,
            dtype=KV_CACHE_DTYPES[config.memory.kv_cache_dtype],
            device=device,
        )
    watch.take_kv(kv_caches)
    if device.type == "cpu":
        kernels.set_num_threads(config.execution.num_threads)
    return PoolingRunner(
        model,
        Pooler(
            pooling.method,
            num_rows=num_rows,
            hidden_size=shape.hidden_size,
            device=device,
            normalize=pooling.normalize,
        ),
        kv_caches=kv_caches,
        rows=RowTable(
            num_rows=num_rows,
            max_pages=-(-config.model.context_length // page_size),
            device=device,
        ),
        page_size=page_size,
        device=device,
    )


def load_pooling_model(
    config: EngineConfig,
    files: ModelFiles,
    shape: Shape,
    pooling: Pooling,
    kernels: Kernels,
    *,
    device: torch.device,
    dtype: torch.dtype,
    watch: LoadWatch | None = None,
) -> PoolingModel:
    """The model with its weights, packed for the kernels."""
    scheme = linear_scheme(config, files)
    num_labels = len(pooling.labels)
    model: Encoder | PooledDecoder
    with timed("model structure"):
        match shape:
            case EncoderConfig():
                head = encoder_head(shape.architecture, shape.hidden_size, num_labels, device)
                model = Encoder(shape, head, kernels, Group(), device, dtype, scheme)
            case DecoderConfig():
                build = ARCHITECTURES.get(shape.architecture)
                stored = dense_weight_dtype(config)
                decoder = build(shape, kernels, Group(), device, dtype, scheme, stored)
                model = PooledDecoder(decoder, decoder_head(shape.hidden_size, num_labels, device))
    fill(model, files, config, dtype, name_of=model.checkpoint_name, watch=watch)
    return model


def only_decoder(shape: Shape, name: str) -> DecoderConfig:
    """The sizes of a decoder; ConfigError for an encoder, which cannot generate."""
    match shape:
        case DecoderConfig():
            return shape
        case EncoderConfig():
            raise ConfigError(
                f"{name} is an encoder, which generates nothing; choose another model"
            )
