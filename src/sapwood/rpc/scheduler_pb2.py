"""The messages of scheduler.proto; their fields and types are in the stub beside this file."""

from sapwood.rpc.descriptors import message_classes

globals().update(message_classes("scheduler.proto"))
