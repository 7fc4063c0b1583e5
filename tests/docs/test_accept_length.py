from __future__ import annotations

from pathlib import Path

from tests.docs.accept_length import NUM_TOKENS, draw


def test_a_picture_is_drawn_of_steps(tmp_path: Path) -> None:
    """Also where a run brought no tokens near the end of outputs."""
    chains = [(place, 4) for place in range(0, NUM_TOKENS, 4)]
    draw([("chains", chains), ("a short one", [(0, 1), (1, 2)])], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
