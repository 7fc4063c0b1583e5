from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.models.encoder.names import ENCODERS
from sapwood.models.pooling import GENERATING, pooling_of
from sapwood.models.registry import ARCHITECTURES
from sapwood.models.text_part import WRAPPERS
from sapwood.schema.pooling import Pooling


def read(
    directory: Path,
    architecture: str,
    *,
    is_embedding: bool = False,
    method: str | None = None,
    **fields: Any,
) -> Pooling | None:
    config = {"architectures": [architecture], "hidden_size": 48, **fields}
    return pooling_of(config, directory, is_embedding=is_embedding, method=method)


def write_modules(directory: Path, *kinds: str, pooling: dict[str, Any] | None = None) -> None:
    modules = [
        {"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir(exist_ok=True)
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_names_that_end_like_those_of_embedders_are_known() -> None:
    names = {*ARCHITECTURES.names(), *WRAPPERS} - set(ENCODERS)
    assert {name for name in names if name.endswith("Model")} == GENERATING


def test_a_decoder_generates_unless_it_is_to_embed(tmp_path: Path) -> None:
    assert read(tmp_path, "LlamaForCausalLM") is None
    assert read(tmp_path, "GPT2LMHeadModel") is None  # not a model without its output layer
    pooling = read(tmp_path, "LlamaForCausalLM", is_embedding=True)
    assert pooling is not None
    assert (pooling.task, pooling.method, pooling.normalize) == ("embed", "last", True)
    assert pooling.decoder == "LlamaForCausalLM"
    assert pooling.size == 48
    assert pooling.labels == ()


@pytest.mark.parametrize(
    ("architecture", "decoder", "method"),
    [
        ("Qwen3Model", "Qwen3ForCausalLM", "last"),
        ("BertModel", None, "mean"),
        ("XLMRobertaModel", None, "mean"),
    ],
)
def test_what_cannot_generate_embeds(
    tmp_path: Path, architecture: str, decoder: str | None, method: str
) -> None:
    pooling = read(tmp_path, architecture)
    assert pooling is not None
    assert (pooling.task, pooling.decoder, pooling.method) == ("embed", decoder, method)


@pytest.mark.parametrize(
    ("architecture", "decoder", "method"),
    [
        ("BertForSequenceClassification", None, "cls"),
        ("Qwen2ForSequenceClassification", "Qwen2ForCausalLM", "last"),
    ],
)
def test_a_head_classifies(
    tmp_path: Path, architecture: str, decoder: str | None, method: str
) -> None:
    pooling = read(tmp_path, architecture, id2label={"1": "good", "0": "bad"})
    assert pooling is not None
    assert (pooling.task, pooling.decoder, pooling.method) == ("classify", decoder, method)
    assert pooling.labels == ("bad", "good")
    assert not pooling.normalize
    assert not pooling.multi_label
    without = read(tmp_path, architecture, problem_type="multi_label_classification")
    assert without is not None
    assert without.labels == ("LABEL_0", "LABEL_1")
    assert without.multi_label


@pytest.mark.parametrize(
    ("fields", "squashes"),
    [
        ({}, True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, True),
    ],
)
def test_whether_a_score_is_a_sigmoid(
    tmp_path: Path, fields: dict[str, Any], squashes: bool
) -> None:
    pooling = read(tmp_path, "BertForSequenceClassification", **fields)
    assert pooling is not None
    assert pooling.squashes == squashes


@pytest.mark.parametrize(
    ("said", "method"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_files_of_sentence_transformers_count(
    tmp_path: Path, said: dict[str, Any], method: str
) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling=said)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    pooling = read(tmp_path, "BertModel")
    assert pooling is not None
    assert (pooling.method, pooling.normalize, pooling.max_tokens) == (method, True, 256)
    assert "1_Pooling/config.json" in pooling.why
    write_modules(tmp_path, "Transformer", "Pooling", pooling=said)
    pooling = read(tmp_path, "BertModel", method="mean")
    assert pooling is not None
    assert (pooling.method, pooling.normalize, pooling.why) == ("mean", False, "asked for")


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Dense", pooling={"pooling_mode": "cls"})
    with pytest.raises(ConfigError, match=r"a module Dense .* not implemented"):
        read(tmp_path, "BertModel")
    write_modules(tmp_path, "Transformer", "Pooling", pooling={"pooling_mode_max_tokens": True})
    with pytest.raises(ConfigError, match=r"asks for pooling_mode_max_tokens.*--pooling-method"):
        read(tmp_path, "BertModel")
    write_modules(tmp_path, "Transformer")
    with pytest.raises(ConfigError, match="has no pooling"):
        read(tmp_path, "BertModel")
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(ModelSourceError, match="must hold a list"):
        read(tmp_path, "BertModel")
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelSourceError, match="not valid JSON"):
        read(tmp_path, "BertModel")
    with pytest.raises(ConfigError, match="ReLU, which is not implemented"):
        read(
            tmp_path,
            "BertForSequenceClassification",
            sentence_transformers={"activation_fn": "torch.nn.ReLU"},
        )


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("LlamaForCausalLM", {"method": "mean"}, "add --is-embedding"),
        (
            "LlamaForCausalLM",
            {"method": "cls", "is_embedding": True},
            "knows nothing of the others",
        ),
        ("BertForSequenceClassification", {"method": "mean"}, "was trained on cls"),
        ("Qwen2Model", {"is_causal": False}, "attend to later ones"),
    ],
)
def test_contradictions(
    tmp_path: Path, architecture: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, architecture, **options)
