import signal

import pytest

from sapwood.app.cli.interrupt import on_interrupt


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_the_first_interrupt_is_a_wish_and_the_second_an_exception():
    stops = []
    with on_interrupt(lambda: stops.append("stop")):
        interrupt()
        assert stops == ["stop"]
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert stops == ["stop"]


def test_afterwards_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="left"), on_interrupt(lambda: None):
        raise ValueError("left")
    assert signal.getsignal(signal.SIGINT) is before
