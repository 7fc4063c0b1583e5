"""A tiny model that sees, with all files that a server reads: tokenizer, template, preprocessor."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from tests.seeing import FAMILIES, IMAGE, VIDEO, save

MARKER = "<|image_pad|>"
TEMPLATE = (
    "{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}"
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|image_pad|>"
    "{% elif part['type'] == 'video' %}<|video_pad|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def save_served(directory: Path) -> Path:
    save(directory, FAMILIES["Qwen2-VL"])
    vision = json.loads((directory / "config.json").read_text())["vision_config"]
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["<|video_pad|>", MARKER])
    assert backend.token_to_id(MARKER) == IMAGE
    assert backend.token_to_id("<|video_pad|>") == VIDEO
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    settings = {
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "min_pixels": 64,
        "max_pixels": 4096,
    }
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / name).write_text(json.dumps(settings))
    return directory
