"""What loading takes beside the model itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sapwood.app.building.loading import LoadWatch
from tests.tiny import llama_config

HIDDEN, INNER, LAYERS = 512, 2048, 8
LOAD = """
import logging, sys
from pathlib import Path
import torch
from sapwood.app.building.resolving import resolve_config
from sapwood.app.building.loaded_models import load_model
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig

logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)  # what torch sets up counts for nobody
asked = EngineConfig(model=ModelConfig(model=sys.argv[1], dtype="bfloat16"))
resolved = resolve_config(asked, home=Path(sys.argv[2]))
model = load_model(resolved)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_loading_takes_little_more_than_the_model(tmp_path: Path, tiny_llama: Path) -> None:
    shapes = {
        "model.embed_tokens": (260, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (260, HIDDEN),
    }
    for layer in range(LAYERS):
        of = f"model.layers.{layer}"
        shapes |= {f"{of}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{of}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{of}.mlp.down_proj": (HIDDEN, INNER)}
        shapes |= {f"{of}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    tensors = {
        f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "model.safetensors")
    config = llama_config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in tiny_llama.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), str(tmp_path / "home")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"take (\d+) MB of memory; (\d+) MB at most", done.stderr)
    assert said is not None, done.stderr
    loaded, peak = (int(number) * 1e6 for number in said.groups())
    assert loaded > 0.9 * size
    # What is read ahead is at least 8 MB, which is much of so small a model.
    assert peak <= 1.15 * size + 16e6
    assert "waiting for tensors to be read took" in done.stderr


def test_a_watch_tells_what_is_loaded_and_shows_how_much() -> None:
    doing: list[str] = []
    watch = LoadWatch(doing.append)
    assert list(watch.following([("a", 1), ("b", 2)])) == [("a", 1), ("b", 2)]
    assert doing == ["loading a", "loading b"]
