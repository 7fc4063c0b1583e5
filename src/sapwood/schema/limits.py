"""Every limit on what a request may hold: its name, its number, its unit, and why it is there.

Whatever a request brings is kept somewhere, copied for each sample, or walked through. So each
text, list and number that a client chooses has a limit here, whichever dialect brings it. Modules
take their numbers from this one; docs/limits.md and the tests are made from `LIMITS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from sapwood.base.errors import InvalidRequest

Unit = Literal["characters", "bytes", "entries", "token ids", "levels", "numbers", "states"]

KiB, MiB = 2**10, 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """At most `most` of something in a request. More is refused by the field's name.

    name    what is limited, as a reader of the documentation says it
    most    the limit itself; with a flag, its default
    unit    what is counted
    fields  where clients send it
    why     what would happen without the limit
    flag    the server's option that sets it; "": the number is fixed
    """

    name: str
    most: int
    unit: Unit
    fields: tuple[str, ...]
    why: str
    flag: str = ""

    def check(self, count: int, param: str, *, hint: str = "") -> None:
        """InvalidRequest, naming the field, its size and the limit, if there are more."""
        if count > self.most:
            way_out = f"; {hint}" if hint else ""
            raise InvalidRequest(
                f"{param} has {count} {self.unit} but at most {self.most} are accepted{way_out}",
                param=param.partition("[")[0],
            )


REQUEST_ID = Limit(
    name="A request's id",
    most=256,
    unit="characters",
    fields=("rid", "request_id"),
    why="every message of the engine about the request carries it",
)
ROUTING_KEY = Limit(
    name="A routing key",
    most=256,
    unit="characters",
    fields=("routing_key", "header x-smg-routing-key"),
    why="engines and gateways keep it as long as the request, or longer",
)
HOST = Limit(
    name="The name of an engine's host",
    most=255,
    unit="characters",
    fields=("bootstrap_host",),
    why="no host's name is longer, and every message of the engine about the request carries it",
)
CACHE_KEY = Limit(
    name="What parts the prefix cache",
    most=KiB,
    unit="characters",
    fields=("extra_key", "cache_salt"),
    why="it is hashed for every request; only its digest is kept",
)
ADAPTER_NAME = Limit(
    name="An adapter's name",
    most=256,
    unit="characters",
    fields=("lora_name", "lora_path"),
    why="it is a label of metrics and part of cached prefixes' names",
)
ADAPTER_SOURCE = Limit(
    name="Where an adapter is loaded from",
    most=4 * KiB,
    unit="characters",
    fields=("lora_path of /load_lora_adapter",),
    why="the server tells it for each loaded adapter",
)
SAMPLES = Limit(
    name="Samples of a prompt",
    most=128,
    unit="numbers",
    fields=("n",),
    why="each sample is a request of its own in the engine",
)
CALL_SAMPLES = Limit(
    name="Samples of a call",
    most=4096,
    unit="numbers",
    fields=("n", "text", "prompt"),
    why="prompts times n are requests in the engine",
    flag="max-samples-per-request",
)
CALL_TOKEN_IDS = Limit(
    name="Token ids in sampling parameters of a call",
    most=2**20,
    unit="token ids",
    fields=("logit_bias", "allowed_token_ids", "stop_token_ids"),
    why="they are copied for each sample",
)
STOPS = Limit(
    name="Stop strings, or stop expressions",
    most=1024,
    unit="entries",
    fields=("stop", "stop_regex"),
    why="they are looked for in every piece of text",
)
STOP_CHARACTERS = Limit(
    name="All stop strings together",
    most=16 * KiB,
    unit="characters",
    fields=("stop",),
    why="as much text is held back while one of them may still come",
)
CALL_STOPS = Limit(
    name="Stop strings that a server takes",
    most=256,
    unit="entries",
    fields=("stop",),
    why="they are looked for in every piece of text",
    flag="max-stop-strings",
)
STOP_LENGTH = Limit(
    name="One stop string",
    most=KiB,
    unit="characters",
    fields=("stop",),
    why="as much text is held back while it may still come",
    flag="max-stop-length",
)
STOP_REGEX_LENGTH = Limit(
    name="A stop expression",
    most=2000,
    unit="characters",
    fields=("stop_regex",),
    why="it becomes an automaton before the request begins",
)
STOP_REGEX_STATES = Limit(
    name="States of a stop expression",
    most=1000,
    unit="states",
    fields=("stop_regex",),
    why="each character of the output may visit all of them",
)
STOP_REGEX_CLASSES = Limit(
    name="Classes of characters in a stop expression",
    most=100,
    unit="entries",
    fields=("stop_regex",),
    why="the automaton's table has a column for each",
)
REGEX_NESTING = Limit(
    name="Groups inside groups of an expression",
    most=50,
    unit="levels",
    fields=("regex", "stop_regex"),
    why="each level is one of the parser's calls",
)
SCHEMA_DEPTH = Limit(
    name="Nesting of a schema or a structural tag",
    most=64,
    unit="levels",
    fields=("json_schema", "structural_tag", "response_format", "tools"),
    why="each level is one of the compiler's calls",
)
CHOICES = Limit(
    name="Texts to choose one of",
    most=4096,
    unit="entries",
    fields=("guided_choice", "structured_outputs.choice"),
    why="each is a rule of a grammar",
)
TOOLS = Limit(
    name="Tools of a request",
    most=1024,
    unit="entries",
    fields=("tools",),
    why="each is a rule of a grammar and a part of the prompt",
)
TOOL_NAME = Limit(
    name="A tool's name",
    most=128,
    unit="characters",
    fields=("tools",),
    why="grammars and answers repeat it",
)
GRAMMAR_BYTES = Limit(
    name="A grammar's text",
    most=256 * KiB,
    unit="bytes",
    fields=("json_schema", "regex", "ebnf", "structural_tag", "response_format"),
    why="compiling takes time and memory that grow with it",
    flag="grammar-max-bytes",
)
TOP_LOGPROBS = Limit(
    name="Likeliest tokens of a place",
    most=256,
    unit="numbers",
    fields=("top_logprobs", "top_logprobs_num"),
    why="so many numbers are told for each token",
)
LOGPROB_TOKEN_IDS = Limit(
    name="Tokens whose log probabilities are told at each place",
    most=1024,
    unit="token ids",
    fields=("token_ids_logprob", "label_token_ids"),
    why="so many numbers are told for each token",
)
LOGPROBS = Limit(
    name="Log probabilities of an answer",
    most=2**22,
    unit="numbers",
    fields=("logprobs", "top_logprobs", "return_logprob"),
    why="they are kept until the answer is complete",
    flag="max-logprobs-per-call",
)
CUSTOM_PROCESSOR = Limit(
    name="The name or the code of a logits processor",
    most=MiB,
    unit="characters",
    fields=("custom_logit_processor",),
    why="each sample's message to the engine carries it",
)
CUSTOM_PARAMS = Limit(
    name="A processor's parameters, of all samples of a call",
    most=16 * MiB,
    unit="bytes",
    fields=("custom_params",),
    why="each sample's message to the engine carries them",
)
DISALLOWED_TOKENS = Limit(
    name="Token ids that are forbidden",
    most=2**20,
    unit="token ids",
    fields=("custom_params.token_ids",),
    why="no vocabulary is larger",
)
METADATA_PAIRS = Limit(
    name="Pairs of metadata",
    most=16,
    unit="entries",
    fields=("metadata of responses, batches and conversations",),
    why="they are kept with what they describe",
)
METADATA_NAME = Limit(
    name="A name in metadata",
    most=64,
    unit="characters",
    fields=("metadata of responses, batches and conversations",),
    why="it is kept with what it describes",
)
METADATA_VALUE = Limit(
    name="A value in metadata",
    most=512,
    unit="characters",
    fields=("metadata of responses, batches and conversations",),
    why="it is kept with what it describes",
)
CALLER = Limit(
    name="What says who calls",
    most=512,
    unit="characters",
    fields=("user, safety_identifier, prompt_cache_key and service_tier of /v1/responses",),
    why="each event of the response repeats it, and it is kept with the response",
)
LINE_ID = Limit(
    name="The id of a line in a batch",
    most=512,
    unit="characters",
    fields=("custom_id",),
    why="the ids of a batch's lines are kept until its end",
)
CONVERSATION_ITEMS = Limit(
    name="Items that one call adds to a conversation",
    most=20,
    unit="entries",
    fields=("items of /v1/conversations",),
    why="they are written to the gateway's database in one transaction",
)
BATCH_FILE = Limit(
    name="An uploaded file",
    most=512 * MiB,
    unit="bytes",
    fields=("file of /v1/files",),
    why="it is kept on the server's disk",
)
UPLOAD_FIELD = Limit(
    name="Another part of an upload",
    most=4 * KiB,
    unit="bytes",
    fields=("purpose", "expires_after"),
    why="parts other than the file are read into memory",
)
PICTURE_PROMPT = Limit(
    name="What a picture shows",
    most=32_000,
    unit="characters",
    fields=("prompt of /v1/images", "negative_prompt"),
    why="it is tokenized whole before it is cut to what the encoders read; as in OpenAI's API",
)
INPUT_PICTURES = Limit(
    name="Pictures to edit",
    most=16,
    unit="entries",
    fields=("image",),
    why="all are in memory at once; as in OpenAI's API",
)
SPEECH_PROMPT = Limit(
    name="The prompt of a transcription",
    most=10_000,
    unit="characters",
    fields=("prompt of /v1/audio/*",),
    why="it is encoded for each file, and the model reads its last 200 tokens",
)
BODY_BYTES = Limit(
    name="A request's body",
    most=64 * MiB,
    unit="bytes",
    fields=("the body",),
    why="it is read as a whole",
    flag="max-request-bytes",
)
BODY_DEPTH = Limit(
    name="Nesting of a body's JSON",
    most=100,
    unit="levels",
    fields=("the body",),
    why="templates and schemas are walked by calls in calls",
    flag="max-json-depth",
)

LIMITS: tuple[Limit, ...] = tuple(one for one in list(globals().values()) if isinstance(one, Limit))
"""All of them, in the order in which this module has them."""

# Checked where requests of all dialects meet, so these only tell the OpenAPI document.
RequestId = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": REQUEST_ID.most})]
Host = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": HOST.most})]
RoutingKey = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": ROUTING_KEY.most})]
CacheKey = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": CACHE_KEY.most})]
ProcessorText = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": CUSTOM_PROCESSOR.most})]
StopRegex = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": STOP_REGEX_LENGTH.most})]
LineId = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": LINE_ID.most})]

CallerText = Annotated[str, msgspec.Meta(max_length=CALLER.most)]
AdapterName = Annotated[str, msgspec.Meta(max_length=ADAPTER_NAME.most)]
AdapterSource = Annotated[str, msgspec.Meta(max_length=ADAPTER_SOURCE.most)]
NumSamples = Annotated[int, msgspec.Meta(ge=1, le=SAMPLES.most)]
Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=METADATA_NAME.most)],
        Annotated[str, msgspec.Meta(max_length=METADATA_VALUE.most)],
    ],
    msgspec.Meta(max_length=METADATA_PAIRS.most),
]


def as_markdown() -> str:
    """A table of all limits, for the documentation."""
    lines = ["| What | At most | Where | Why | Flag |", "|---|---|---|---|---|"]
    for one in LIMITS:
        where = ", ".join(f"`{name}`" if " " not in name else name for name in one.fields)
        flag = f"`--{one.flag}`" if one.flag else "—"
        lines.append(
            f"| {one.name} | {_spelled(one.most)} {one.unit} | {where} | {one.why} | {flag} |"
        )
    return "\n".join(lines)


def _spelled(number: int) -> str:
    for size, name in ((MiB, "Mi"), (KiB, "Ki")):
        if number >= size and number % size == 0:
            return f"{number // size} {name}"
    return f"{number:,}"
