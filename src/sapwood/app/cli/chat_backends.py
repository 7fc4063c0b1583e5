"""The backends of `sapwood chat`: an engine in this process, or a server with OpenAI's API."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sapwood.base.errors import EngineUnavailable, InvalidRequest, SapwoodError

if TYPE_CHECKING:
    import httpx

    from sapwood.app.offline.llm import LLM

Message = Mapping[str, Any]

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text of an answer.

    is_reasoning       whether the text is the model's thinking instead of its answer
    num_output_tokens  output tokens so far; None: the backend does not count them
    """

    text: str
    is_reasoning: bool = False
    num_output_tokens: int | None = None


class ChatBackend(Protocol):
    """A model that answers, wherever it runs."""

    @property
    def model(self) -> str: ...

    def answer(self, messages: Sequence[Message]) -> Generator[Piece, None, None]:
        """The pieces of the answer as they come. Closing the generator ends the answer.

        Raises SapwoodError if the answer fails.
        """
        ...

    def close(self) -> None: ...


class InProcess:
    """The engine runs in this process.

    sampling  the sampling parameters that the user has set; the others have the model's defaults
    """

    def __init__(self, llm: LLM, sampling: Mapping[str, Any]) -> None:
        self._llm = llm
        # A chat's answer ends when the model ends it, or the context does.
        self._sampling = {"max_new_tokens": None, **sampling}

    @property
    def model(self) -> str:
        return self._llm.services.model_name

    def answer(self, messages: Sequence[Message]) -> Generator[Piece, None, None]:
        with closing(self._llm.stream_chat(messages, self._sampling)) as chunks:
            for chunk in chunks:
                yield Piece(text=chunk.text, num_output_tokens=chunk.num_output_tokens)

    def close(self) -> None:
        self._llm.close()


class Remote:
    """A server with OpenAI's chat completions.

    url       the server's address, with or without /v1
    model     name of the model to ask; None: the first in the server's list
    sampling  the sampling parameters that the user has set
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        api_key: str | None,
        sampling: Mapping[str, Any],
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        import httpx

        base = url.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        try:
            parsed = httpx.URL(base)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"--url {url} is no URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidRequest(f"--url is {url!r} but must start with http:// or https://")
        self._url = base
        self._client = httpx.Client(
            base_url=base,
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            # No limit on the time between two tokens: the server may be busy.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=not _is_this_machine(parsed.host),
            transport=transport,
        )
        names = {"max_new_tokens": "max_tokens"}
        self._sampling = {names.get(name, name): value for name, value in sampling.items()}
        self._model = model if model is not None else self._first_model()

    @property
    def model(self) -> str:
        return self._model

    def answer(self, messages: Sequence[Message]) -> Generator[Piece, None, None]:
        import httpx

        body = {
            "model": self._model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> str:
        import httpx

        try:
            response = self._client.get("/models", timeout=CONNECT_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise EngineUnavailable(
                f"{self._url}/models lists no model; name one with --model"
            ) from error

    def _unreachable(self, error: Exception) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self._url} does not answer: {error or type(error).__name__}; "
            "is the server running, and is this its address?"
        )


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    """The pieces in server-sent events; EngineUnavailable if the stream ends too early."""
    is_finished = False
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = _event(data)
        if "error" in event:
            raise SapwoodError(_message_of(event) or "the server failed on this answer")
        count = (event.get("usage") or {}).get("completion_tokens")
        for choice in event.get("choices") or []:
            is_finished = is_finished or choice.get("finish_reason") is not None
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                yield Piece(text=delta["reasoning_content"], is_reasoning=True)
            if delta.get("content"):
                yield Piece(text=delta["content"], num_output_tokens=count)
        if count is not None:
            yield Piece(text="", num_output_tokens=count)
    if not is_finished:
        raise EngineUnavailable("the connection ended before the answer did; ask again")


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise SapwoodError(f"the server sent an event that is no JSON object: {data[:200]}")
    return event


def _refusal(response: httpx.Response) -> SapwoodError:
    try:
        reason = _message_of(response.json())
    except ValueError:
        reason = None
    said = reason or response.text.strip()[:200] or "no reason given"
    return SapwoodError(f"the server answers with status {response.status_code}: {said}")


def _message_of(body: Any) -> str | None:
    """The message in the body of an error, nested like OpenAI's or flat."""
    if not isinstance(body, dict):
        return None
    inner = body.get("error", body)
    message = inner.get("message") if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else None


def _is_this_machine(host: str) -> bool:
    """Whether the address is this machine, for which no proxy must be used."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
