"""The one tree of errors that sapwood raises on purpose.

    SapwoodError                  500  something on our side
    ├── InvalidRequest            400  the request cannot be honoured as it is
    │   ├── UnsupportedFeature    400  a field that asks for what this server does not offer
    │   └── PromptTooLong         400  more tokens than the context or the KV pool holds
    ├── NotFound                  404  no such model, request or route
    ├── Overloaded                503  the queue is full, or the server is draining
    ├── EngineUnavailable         503  the engine process is starting, or has died
    └── StartupError              500  raised before serving begins; the command exits with 1
        ├── ConfigError                options that contradict each other or this machine
        ├── ModelSourceError           no source could provide the model
        ├── WeightError                the checkpoint does not fit the architecture
        └── IntegrityError             files are not what their checksums say

A message says what happened, the limit, and the way out. The HTTP status lives on the class, so
that a frontend translates an error without knowing which one it is.
"""

from __future__ import annotations


class SapwoodError(Exception):
    """Base of every error that sapwood raises on purpose.

    status  the HTTP status that a frontend answers with
    type    the error's name on the wire, as OpenAI's error body spells it
    param   the request field that is at fault, if one is
    """

    status: int = 500
    type: str = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(SapwoodError):
    status = 400
    type = "BadRequestError"


class UnsupportedFeature(InvalidRequest):
    """A field asks for something that this server does not offer; nothing is ignored in silence."""


class PromptTooLong(InvalidRequest):
    """The prompt has more tokens than `limit`.

    Agents look for "prompt is too long", Claude Code among them, or "context length" in the message
    of a 400; then they shorten the conversation and ask again."""

    def __init__(self, num_tokens: int, limit: int, what: str, *, param: str | None = None) -> None:
        super().__init__(
            f"the prompt is too long: it has {num_tokens} tokens, but {what} allows at most "
            f"{limit}; shorten it by {num_tokens - limit} or start the server with a larger limit",
            param=param,
        )
        self.num_tokens = num_tokens
        self.limit = limit


class NotFound(SapwoodError):
    status = 404
    type = "NotFoundError"


class Overloaded(SapwoodError):
    status = 503
    type = "ServiceUnavailableError"


class EngineUnavailable(SapwoodError):
    status = 503
    type = "ServiceUnavailableError"


class StartupError(SapwoodError):
    """Raised before serving begins; the command line prints it without a stack and exits with 1."""


class ConfigError(StartupError):
    pass


class ModelSourceError(StartupError):
    pass


class WeightError(StartupError):
    pass


class IntegrityError(StartupError):
    pass
