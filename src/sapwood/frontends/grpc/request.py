"""What the service is asked for -> requests of this server."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence, Sized
from typing import Any

from google.protobuf.json_format import MessageToDict

from sapwood.base.errors import InvalidRequest, PromptTooLong, UnsupportedFeature
from sapwood.frontends.native.logprobs import logprob_options
from sapwood.frontends.serving.grammar import chosen_grammar
from sapwood.frontends.serving.media import MediaParts
from sapwood.frontends.serving.sampling import renamed
from sapwood.frontends.serving.services import Services
from sapwood.rpc import scheduler_pb2 as pb
from sapwood.schema.limits import LOGPROB_TOKEN_IDS, STOPS
from sapwood.schema.media_source import MediaKind, MediaSource
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.embedding import EmbedRequest
from sapwood.text.generation import TextRequest

_WHERE = "sampling_params"
_GENERATE_NOT_OFFERED = {
    "disaggregated_params": "this engine reads its prompts itself",
    "input_embeds": "they come without their size here; send them to /generate by HTTP",
    "return_hidden_states": "answers here have no place for the prompt's; ask /generate by HTTP",
    "require_reasoning": "thinking is not counted where only tokens are made",
}
_EMBED_NOT_OFFERED = {
    "mm_inputs": "the models whose vectors are served here read text only",
    "token_type_ids": "the model's own types of tokens are used",
    "is_cross_encoder": "a pair of texts is not told apart by its tokens; ask /v1/rerank by HTTP",
    "texts": "texts must come as token ids, in tokenized.input_ids",
}


def text_request(asked: pb.GenerateRequest, services: Services) -> TextRequest:
    """InvalidRequest, which names the field, for what cannot be honoured."""
    services.check_task("tokens")
    _refuse(asked, _GENERATE_NOT_OFFERED)
    params = asked.sampling_params
    interval = params.stream_interval if params.HasField("stream_interval") else 1
    rank = asked.data_parallel_rank if asked.HasField("data_parallel_rank") else None
    LOGPROB_TOKEN_IDS.check(len(asked.token_ids_logprob), "token_ids_logprob")
    # Without presence nothing tells a 0 that was sent from one that was not.
    logprobs = logprob_options(
        True, asked.logprob_start_len, asked.top_logprobs_num, tuple(asked.token_ids_logprob)
    )
    return TextRequest(
        request_id=asked.request_id or uuid.uuid4().hex,
        prompt=_prompt(asked, services),
        media=_media(asked, services),
        options=RequestOptions(
            sampling=_sampling(params, asked.custom_logit_processor or None, services),
            logprobs=logprobs if asked.return_logprob else None,
            adapter=services.adapter_of("", asked.lora_id or None),
            data_parallel_rank=services.replica_of(rank),
        ),
        n=params.n or 1,
        stream_interval=interval,
    )


_MEDIA_NOT_OFFERED = {
    "audio_urls": "send a sound to /v1/audio/transcriptions by HTTP",
    "audio_data": "send a sound to /v1/audio/transcriptions by HTTP",
    "pixel_values": "pictures are prepared here; send image_urls or image_data",
    "model_specific_tensors": "pictures are prepared here; send image_urls or image_data",
}


def _media(asked: pb.GenerateRequest, services: Services) -> Sequence[MediaSource]:
    """Pictures and videos whose markers, or places, are in the prompt's token ids."""
    if not asked.HasField("mm_inputs"):
        return ()
    given = asked.mm_inputs
    _refuse(given, _MEDIA_NOT_OFFERED)
    media = MediaParts(services.media_markers)
    kinds: tuple[tuple[MediaKind, Sequence[str], Sequence[bytes]], ...] = (
        ("image", given.image_urls, given.image_data),
        ("video", given.video_urls, given.video_data),
    )
    for kind, urls, files in kinds:
        for i, url in enumerate(urls):
            media.add(kind, f"mm_inputs.{kind}_urls[{i}]", url=url)
        for i, data in enumerate(files):
            media.add(kind, f"mm_inputs.{kind}_data[{i}]", data=data)
    return media.sources


def embed_request(asked: pb.EmbedRequest, services: Services) -> EmbedRequest:
    """InvalidRequest, which names the field, for what cannot be honoured."""
    # SGLang's routers ask for class scores by this method too.
    if services.pooling is None:
        services.check_task("embed")
    _refuse(asked, _EMBED_NOT_OFFERED)
    return EmbedRequest(
        request_id=asked.request_id or uuid.uuid4().hex,
        text=_prompt(asked, services),
        param="input_ids",
        options=RequestOptions(
            data_parallel_rank=services.replica_of(asked.data_parallel_rank or None)
        ),
    )


def _refuse(asked: Any, not_offered: dict[str, str]) -> None:
    given = {field.name for field, _ in asked.ListFields()}
    for name, why in not_offered.items():
        if name in given:
            raise UnsupportedFeature(f"{name} is not offered: {why}; leave it out", param=name)


def _prompt(asked: pb.GenerateRequest | pb.EmbedRequest, services: Services) -> list[int]:
    ids = asked.tokenized.input_ids
    if not ids:
        raise InvalidRequest(
            "tokenized.input_ids is empty; the prompt must come as token ids", param="tokenized"
        )
    limit = services.engine.info.context_length
    # Before there is a list of them: as Python's numbers they take ten times the memory.
    if len(ids) > limit:
        raise PromptTooLong(
            len(ids), limit, f"the context length of {limit}", param="tokenized.input_ids"
        )
    return list(ids)


def _sampling(
    params: pb.SamplingParams, processor: str | None, services: Services
) -> SamplingParams:
    which = params.WhichOneof("constraint")
    grammar = None
    if which is not None:
        name = "ebnf" if which == "ebnf_grammar" else which
        grammar = chosen_grammar(where=_WHERE, **{name: getattr(params, which)})
    vocab_size = services.generator.vocab_size
    STOPS.check(len(params.stop), "stop")
    _check_count(params.stop_token_ids, "stop_token_ids", vocab_size)
    _check_count(params.logit_bias, "logit_bias", vocab_size)
    custom = _custom(params) if params.HasField("custom_params") else {}
    try:
        return SamplingParams(
            max_new_tokens=params.max_new_tokens if params.HasField("max_new_tokens") else None,
            min_new_tokens=params.min_new_tokens,
            temperature=_decimal(params.temperature),
            top_k=params.top_k or -1,
            top_p=_decimal(params.top_p) or 1.0,
            min_p=_decimal(params.min_p),
            frequency_penalty=_decimal(params.frequency_penalty),
            presence_penalty=_decimal(params.presence_penalty),
            repetition_penalty=_decimal(params.repetition_penalty) or 1.0,
            logit_bias=_biases(params.logit_bias.items()),
            stop=tuple(params.stop),
            stop_token_ids=tuple(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            no_stop_trim=params.no_stop_trim,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            custom_logit_processor=processor,
            custom_params=custom,
            grammar=grammar,
        )
    except InvalidRequest as error:
        raise renamed(error, {}, where=_WHERE) from None


def _check_count(given: Sized, name: str, most: int) -> None:
    """InvalidRequest if there are more than any request can need."""
    if len(given) > most:
        raise InvalidRequest(
            f"{name} has {len(given)} entries but at most {most} are accepted", param=name
        )


def _biases(given: Iterable[tuple[str, float]]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in given:
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise InvalidRequest(
                f"logit_bias has the key {key[:80]!r} but keys are token ids", param="logit_bias"
            )
        biases[int(key)] = _decimal(bias)
    return biases


def _custom(params: pb.SamplingParams) -> dict[str, Any]:
    """The object as JSON would have brought it: a Struct's numbers are all floats."""
    try:
        whole: dict[str, Any] = _whole_numbers(MessageToDict(params.custom_params))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"custom_params is no JSON: {error}", param="custom_params") from None
    return whole


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _decimal(value: float) -> float:
    """The number that the client meant: as fp32, 0.7 has become 0.699999988."""
    return float(f"{value:.7g}")
