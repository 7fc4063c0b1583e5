"""The messages are SGLang's on the wire, and the files beside the .proto say the same as these."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

import sapwood.rpc
from sapwood.rpc import methods, scheduler_pb2

FOLDER = Path(sapwood.rpc.__file__).parent

with warnings.catch_warnings():
    # They were made by an older protoc than the runtime's.
    warnings.simplefilter("ignore")
    from smg_grpc_proto import sglang_scheduler_pb2 as theirs
    from smg_grpc_proto.generated import common_pb2

NOT_OURS = {("SchedulerLoad", "num_waiting_uncached_tokens")}
"""Fields of theirs that are not served."""


def facts(field: FieldDescriptor) -> tuple[object, ...]:
    """All that counts on the wire, and whether absence is told."""
    kind = field.message_type.name if field.message_type is not None else None
    return (
        field.name,
        field.type,
        field.is_repeated,
        field.has_presence,
        kind,
        None if field.containing_oneof is None else field.containing_oneof.name,
    )


def fields(message: Descriptor) -> dict[int, tuple[object, ...]]:
    return {one.number: facts(one) for one in message.fields}


def ours() -> list[str]:
    names = vars(scheduler_pb2)
    return sorted(name for name, one in names.items() if hasattr(one, "DESCRIPTOR"))


@pytest.mark.parametrize("name", ours())
def test_fields_have_sglangs_numbers_and_types(name: str) -> None:
    other = common_pb2 if name.startswith("FlushCache") else theirs
    expected = fields(getattr(other, name).DESCRIPTOR)
    missing = {number for number, one in expected.items() if (name, one[0]) in NOT_OURS}
    expected = {number: one for number, one in expected.items() if number not in missing}
    assert fields(getattr(scheduler_pb2, name).DESCRIPTOR) == expected


def test_methods_are_sglangs() -> None:
    known = theirs.DESCRIPTOR.services_by_name["SglangScheduler"]
    assert known.full_name == methods.SCHEDULER
    served = [one for one in vars(methods).values() if isinstance(one, methods.Method)]
    for method in served:
        if method.service == methods.SCHEDULER:
            described = known.methods_by_name[method.name]
            assert described.input_type.name == method.asked.DESCRIPTOR.name
            assert described.output_type.name == method.answer.DESCRIPTOR.name
            assert described.server_streaming == method.streams


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="`pip install grpcio-tools` to compare")
    protos = sorted(str(one) for one in FOLDER.glob("*.proto"))
    made = tmp_path / "made.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER.parent.parent}"]
    command += ["--include_imports", f"--descriptor_set_out={made}", *protos]
    subprocess.run(command, check=True)
    assert made.read_bytes() == (FOLDER / "descriptors.binpb").read_bytes()


def test_nobody_pays_for_grpc_who_does_not_ask_for_it() -> None:
    program = (
        "import sys, sapwood.app.serving.launch\n"
        "import sapwood.app.gateway.assembly, sapwood.app.gateway.chats\n"
        "assert not {'grpc', 'sapwood.rpc'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
