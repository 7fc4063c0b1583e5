"""Pooling: how a model makes an embedding or scores of a text, instead of generating tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["embed", "classify"]
Method = Literal["last", "mean", "cls"]
METHODS: tuple[Method, ...] = ("last", "mean", "cls")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How one model makes an embedding or scores from the hidden states of a text.

    task         "embed": one vector per text; "classify": one number per label
    method       the hidden state that stands for the text: the last token's, the mean of all
                 tokens', or the first token's ("cls")
    why          which file or option the method comes from, for the operator
    normalize    whether vectors are scaled to length 1
    decoder      architecture of the decoder that computes the hidden states; None: an encoder,
                 whose tokens attend to all others of their text, later ones too
    labels       names of the classes, by index
    squashes     whether a relevance score is the sigmoid of the output, in a model with one label
    multi_label  whether a text may have several labels (sigmoid of each) or has one (softmax)
    size         hidden size, which is the length of an embedding
    max_tokens   tokens of the longest text that the model was made for; None: it does not say
    """

    task: Task
    method: Method
    why: str
    size: int
    normalize: bool = True
    decoder: str | None = None
    labels: tuple[str, ...] = ()
    squashes: bool = True
    multi_label: bool = False
    max_tokens: int | None = None

    @property
    def is_encoder(self) -> bool:
        return self.decoder is None

    @property
    def uses_prefixes(self) -> bool:
        """Whether a text may use a cached prefix instead of computing its tokens.

        A cached prefix brings keys and values, but no hidden states. So only a method that needs
        nothing but the last token's hidden state may use prefixes, and only in a decoder: in an
        encoder all hidden states depend on the tokens that follow.
        """
        return self.decoder is not None and self.method == "last"


def why_not(pooling: Pooling | None, wanted: Task | Literal["tokens"]) -> str | None:
    """Why a model cannot do the task, with the way out; None if it can.

    pooling  of the model; None: the model generates
    """
    task = "tokens" if pooling is None else pooling.task
    return None if task == wanted else _WHY_NOT[task, wanted]


_WHY_NOT = {
    ("tokens", "embed"): "this server's model generates text and makes no embeddings; serve an "
    "embedding model, or start the server with --is-embedding",
    ("tokens", "classify"): "this server's model generates text and has no classification head; "
    "serve one that has (…ForSequenceClassification)",
    ("embed", "tokens"): "this server's model makes embeddings and generates no text; use "
    "/v1/embeddings, or serve a model that generates",
    ("embed", "classify"): "this server's model makes embeddings and has no classification head; "
    "use /v1/embeddings, or serve a model that has one (…ForSequenceClassification)",
    ("classify", "tokens"): "this server's model classifies and generates no text; use "
    "/v1/classify, or serve a model that generates",
    ("classify", "embed"): "this server's model classifies and makes no embeddings; use "
    "/v1/classify, or serve an embedding model",
}
