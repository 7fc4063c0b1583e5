from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from sapwood.base.channel import AsyncZmqReceiver, QueueChannel, ZmqReceiver, ZmqSender
from sapwood.schema.request import Abort, EngineInput, Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams

GENERATE = Generate(
    request_id="a",
    prompt_ids=[1, 2],
    options=RequestOptions(sampling=SamplingParams(stop=("x",), logit_bias={5: 1.5}, seed=2**63)),
)


def test_a_queue_keeps_the_order_and_does_not_wait_when_told_not_to() -> None:
    channel: QueueChannel[int] = QueueChannel()
    assert channel.receive(0.0) == []
    assert channel.receive(0.01) == []
    channel.send(1)
    channel.send(2)
    assert channel.receive(0.0) == [1, 2]
    threading.Timer(0.05, channel.send, [3]).start()
    assert channel.receive(None) == [3]


def test_messages_cross_zmq_as_they_were(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/requests"
    receiver: ZmqReceiver[EngineInput] = ZmqReceiver(address, EngineInput, bind=True)
    sender: ZmqSender[EngineInput] = ZmqSender(address, bind=False)
    try:
        assert receiver.receive(0.0) == []
        sender.send(GENERATE)
        sender.send(Abort("b"))
        received: list[EngineInput] = []
        while len(received) < 2:
            received += receiver.receive(5.0)
        assert received == [GENERATE, Abort("b")]
    finally:
        sender.close()
        receiver.close()


def test_an_asyncio_program_receives(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/outputs"

    async def exchange() -> EngineInput:
        receiver: AsyncZmqReceiver[EngineInput] = AsyncZmqReceiver(address, EngineInput, bind=True)
        sender: ZmqSender[EngineInput] = ZmqSender(address, bind=False)
        try:
            sender.send(GENERATE)
            return await asyncio.wait_for(anext(receiver.messages()), 5.0)
        finally:
            sender.close()
            receiver.close()

    assert asyncio.run(exchange()) == GENERATE


def test_a_sender_does_not_wait_for_a_receiver_that_is_gone(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/requests"
    sender: ZmqSender[EngineInput] = ZmqSender(address, bind=True)
    try:
        sender.send(Abort("nobody hears this"))
    finally:
        sender.close()


def test_a_receiver_listens_at_further_addresses(tmp_path: Path) -> None:
    first, second = (f"ipc://{tmp_path}/{name}" for name in ("first", "second"))
    receiver: ZmqReceiver[EngineInput] = ZmqReceiver(first, EngineInput, bind=True)
    receiver.listen(second)
    senders = [ZmqSender[EngineInput](address, bind=False) for address in (first, second)]
    for number, sender in enumerate(senders):
        sender.send(Abort(f"r{number}"))
    received: list[EngineInput] = []
    while len(received) < 2:
        received += receiver.receive(None)
    assert sorted(str(message) for message in received) == [str(Abort(f"r{n}")) for n in (0, 1)]
    for socket in (receiver, *senders):
        socket.close()
