"""CLIP's and T5's encoders against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.encoder.clip import ClipTextEncoder
from sapwood.models.encoder.t5 import T5Encoder
from tests.painting_peers import build_of, filled, random_weights

CLIP: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "projection_dim": 16,
}
T5: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}


def _named(model: Any, ours: Any) -> dict[str, torch.Tensor]:
    names: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        names.setdefault(ours.checkpoint_name(name), tensor)
    return names


@pytest.mark.parametrize("eos", [2, 98])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_clip_equals_transformers(kind: str, activation: str, eos: int) -> None:
    config = transformers.CLIPTextConfig(**CLIP, hidden_act=activation, eos_token_id=eos)
    peer = getattr(transformers, kind)(config).eval()
    random_weights(peer)
    hf = config.to_dict() | {"architectures": [kind]}
    ours = ClipTextEncoder(hf, build_of(TorchKernels()))
    filled(ours, _named(peer, ours))
    token_ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    token_ids[0, 7:] = token_ids[1, 19:] = 98
    want = peer(token_ids, output_hidden_states=True)
    got = ours(token_ids)
    torch.testing.assert_close(got.states, want.last_hidden_state, atol=2e-5, rtol=1e-4)
    pooled = want.text_embeds if kind.endswith("Projection") else want.pooler_output
    torch.testing.assert_close(got.pooled, pooled, atol=2e-5, rtol=1e-4)
    for skipped in (0, 1, 2):
        got = ours(token_ids, skipped_layers=skipped, is_normed=False)
        states = want.hidden_states[-1 - skipped]
        torch.testing.assert_close(got.states, states, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(got.pooled, pooled, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "UMT5EncoderModel"])
@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_t5_equals_transformers(kind: str, projection: str) -> None:
    make = getattr(transformers, kind)
    config = make.config_class(**T5, feed_forward_proj=projection)
    peer = make(config).eval()
    random_weights(peer)
    ours = T5Encoder(config.to_dict(), build_of(TorchKernels()))
    filled(ours, _named(peer, ours))
    token_ids = torch.randint(3, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    want = peer(token_ids).last_hidden_state
    torch.testing.assert_close(ours(token_ids).states, want, atol=5e-5, rtol=1e-4)
    is_text = torch.ones(2, 33, dtype=torch.bool)
    is_text[0, 5:] = False
    want = peer(token_ids, attention_mask=is_text).last_hidden_state
    got = ours(token_ids, is_text=is_text).states
    torch.testing.assert_close(got[is_text], want[is_text], atol=5e-5, rtol=1e-4)
