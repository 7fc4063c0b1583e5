from __future__ import annotations

import pytest

from sapwood.schema.logits_processors import code_of


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("disallowed_tokens", None),
        ('{"callable": "8004"}', "8004"),
        (' {"callable": 3}', ""),
        ("{", ""),
        ('{"other": ' + "[" * 100_000 + "]" * 100_000 + "}", ""),
    ],
)
def test_code_is_told_from_names(asked, code):
    assert code_of(asked) == code
