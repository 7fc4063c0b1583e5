"""Messages between two processes, and how each notices the other's end."""

from __future__ import annotations

import socket
import threading

import pytest

from sapwood.distributed.link import Link, connect


@pytest.fixture
def ends():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = connect("127.0.0.1", listener.getsockname()[1], timeout_s=5.0)
        far = Link(listener.accept()[0])
    yield near, far
    near.close()
    far.close()


def test_messages_arrive_whole_and_in_order(ends):
    near, far = ends
    messages = [b"", b"one", b"two" * 100_000]
    sender = threading.Thread(target=lambda: [near.send(message) for message in messages])
    sender.start()
    assert [far.receive() for _ in messages] == messages
    sender.join()


def test_the_end_of_one_side_is_seen_by_the_other(ends):
    near, far = ends
    is_seen = threading.Event()
    far.on_end(is_seen.set)
    near.send(b"last words")
    near.close()
    assert is_seen.wait(10.0)
    assert far.receive() == b"last words"
    assert far.receive() is None


def test_a_message_that_is_too_long_ends_the_connection(ends):
    near, far = ends
    near.send(b"x" * 100)
    assert far.receive(max_bytes=99) is None


def test_who_says_nothing_is_not_waited_for(ends):
    _, far = ends
    far.set_timeout(0.01)
    with pytest.raises(TimeoutError):
        far.receive()


def test_nobody_to_connect_to():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TimeoutError, match=f"127.0.0.1:{port}"):
        connect("127.0.0.1", port, timeout_s=0.01)
