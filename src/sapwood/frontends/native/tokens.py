"""POST /tokenize and /detokenize, also below /v1: the model's tokenizer alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import Alias, FieldTable, NotOffered, TokenId, parse
from sapwood.schema.unsupported import refuse
from sapwood.text.token_names import TokenNames

DECODE_IN_THREAD_TOKENS = 4096
"""A text with at least so many tokens is decoded in a thread, so that the event loop goes on."""

Texts = Annotated[list[str], msgspec.Meta(min_length=1)]


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize.

    prompt              a text, or several
    add_special_tokens  whether the tokenizer adds BOS or EOS; default: true, but false where the
                        text is in `content`, as llama.cpp's clients send it
    with_pieces         tell each token as an object with its id and its piece of the text
    parse_special       whether special tokens in the text are tokens; only true is served
    """

    prompt: str | Texts
    model: str = ""
    add_special_tokens: bool | None = None
    with_pieces: bool = False
    parse_special: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize.

    tokens  the token ids of a text, or of several
    """

    tokens: list[TokenId | list[TokenId]]
    model: str = ""
    skip_special_tokens: bool = True


TOKENIZE_FIELDS = FieldTable(
    title="POST /tokenize",
    shape=TokenizeRequest,
    aliases={"content": Alias(of="prompt"), "add_special": Alias(of="add_special_tokens")},
    not_offered={
        "messages": NotOffered(why="the route takes texts"),
        "return_token_strs": NotOffered(why="the answer has token ids"),
    },
)
DETOKENIZE_FIELDS = FieldTable(title="POST /detokenize", shape=DetokenizeRequest)


async def tokenize(request: Request, services: Services) -> Response:
    body = await read_json(request)
    asked = parse(body, TOKENIZE_FIELDS)
    services.check_model(asked.model)
    if not asked.parse_special:
        refuse(
            UnsupportedFeature(
                "parse_special=false is not supported by this server: special tokens in a text are "
                "always tokens; leave it out",
                param="parse_special",
            )
        )
    adds_special = asked.add_special_tokens
    if adds_special is None:
        adds_special = "content" not in body
    is_one = isinstance(asked.prompt, str)
    texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    encode = services.generator.encode
    tokens: list[list[Any]] = [await encode(text, adds_special) for text in texts]
    counts = [len(token_ids) for token_ids in tokens]
    if asked.with_pieces:
        names = TokenNames(services.tokenizer.texts)
        tokens = [[_piece(names, token_id) for token_id in token_ids] for token_ids in tokens]
    return json_response(
        {
            "tokens": tokens[0] if is_one else tokens,
            "count": counts[0] if is_one else counts,
            "max_model_len": services.engine.info.context_length,
        }
    )


def _piece(names: TokenNames, token_id: int) -> dict[str, Any]:
    """A token as llama.cpp tells one: `piece` is a text, or the bytes of a part of a character."""
    raw = names.raw(token_id)
    try:
        return {"id": token_id, "piece": raw.decode()}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(raw)}


async def detokenize(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), DETOKENIZE_FIELDS)
    services.check_model(asked.model)
    lists, is_one = _token_lists(asked.tokens)
    texts: list[str] = []
    for token_ids in lists:
        services.generator.check_token_ids(token_ids, "tokens", param="tokens")
        texts.append(await _decode(services, token_ids, asked.skip_special_tokens))
    text = texts[0] if is_one else texts
    # The second is llama.cpp's name of the first.
    return json_response({"text": text, "content": text})


def _token_lists(given: Sequence[int | list[int]]) -> tuple[list[list[int]], bool]:
    """(the token ids of each text, whether the body has a single text)"""
    flat = [item for item in given if isinstance(item, int)]
    if len(flat) == len(given):
        return [flat], True
    if flat:
        raise InvalidRequest(
            "tokens mixes token ids with lists of them; send one list, or a list of lists",
            param="tokens",
        )
    return [item for item in given if not isinstance(item, int)], False


async def _decode(services: Services, token_ids: list[int], skip_special_tokens: bool) -> str:
    if len(token_ids) < DECODE_IN_THREAD_TOKENS:
        return services.tokenizer.decode(token_ids, skip_special_tokens)
    return await asyncio.to_thread(services.tokenizer.decode, token_ids, skip_special_tokens)
