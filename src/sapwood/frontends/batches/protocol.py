"""Requests about files and batches. Source: OpenAI's API reference."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from sapwood.schema.fields import FieldTable
from sapwood.schema.limits import Metadata

MIN_LIFE_S, MAX_LIFE_S = 3600, 30 * 24 * 3600


class Expiry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file is deleted this number of seconds after it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=MIN_LIFE_S, le=MAX_LIFE_S)]


class CreateBatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/batches.

    completion_window     time after which unanswered lines become errors: "24h", or any other
                          number of m, h or d
    output_expires_after  when the result files are deleted; default: never
    """

    input_file_id: str
    endpoint: str
    completion_window: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,3}[mhd]$")]
    metadata: Metadata | None = None
    output_expires_after: Expiry | None = None


CREATE_FIELDS = FieldTable(title="POST /v1/batches", shape=CreateBatchRequest)
EXPIRY_FIELDS = FieldTable(title="expires_after of POST /v1/files", shape=Expiry)
