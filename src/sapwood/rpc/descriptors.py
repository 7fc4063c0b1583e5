"""Message classes of the .proto files here, made at import of what protoc has read from them.

protoc's own modules would demand a runtime of their version, and register their messages for the
whole process, where those of SGLang's packages have the same names.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

FOLDER = "sapwood/rpc"


def message_classes(file: str) -> dict[str, type[Message]]:
    """The messages of that .proto file, by their names."""
    found = _pool().FindFileByName(f"{FOLDER}/{file}")
    return {name: GetMessageClass(one) for name, one in found.message_types_by_name.items()}


@cache
def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    packed = (files("sapwood.rpc") / "descriptors.binpb").read_bytes()
    for file in FileDescriptorSet.FromString(packed).file:
        pool.Add(file)
    return pool
