"""A checkpoint in the format of another tool, rounded to the nearest: for docs/quantization.md.

    python -m tests.rounded_checkpoint MODEL TARGET FORMAT

MODEL is a directory with one model.safetensors, FORMAT a name of tests/quantized_checkpoints.CASES.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.quantized_checkpoints import CASES, quantised


def main(model: Path, target: Path, name: str) -> None:
    if name not in CASES:
        raise SystemExit(f"no format is called {name!r}; there are {', '.join(sorted(CASES))}")
    case = CASES[name]
    target.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    weights = load_file(model / "model.safetensors")
    stored, _ = quantised(weights, lambda _: lambda weight: case.make(weight.float()))
    tensors = {name: tensor.clone().contiguous() for name, tensor in stored.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["quantization_config"] = case.config
    (target / "config.json").write_text(json.dumps(config), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
