"""The encoders among the architectures. No torch, also not for type checks."""

from __future__ import annotations

_BERT = "sapwood.models.encoder.bert:Encoder"
_ROBERTA = "sapwood.models.encoder.bert:RobertaEncoder"
ENCODERS = {
    "BertModel": _BERT,
    "BertForSequenceClassification": _BERT,
    "RobertaModel": _ROBERTA,
    "RobertaForSequenceClassification": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "XLMRobertaForSequenceClassification": _ROBERTA,
}
"""Architectures whose tokens attend to all others of their text; all other ones are decoders."""
