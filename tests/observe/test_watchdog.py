"""A stuck process is reported with every thread's stack, and ended. Each runs as a real one."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from sapwood.observe.watchdog import EXIT_STUCK, Watchdog

STUCK_ENGINE = """
    import logging, sys, threading, time
    from sapwood.base.channel import CallbackSender, QueueChannel
    from sapwood.base.clock import MonotonicClock
    from sapwood.engine.instruments import Instruments
    from sapwood.engine.loop import EngineLoop
    from sapwood.engine.scheduler import Scheduler
    from sapwood.memory.ledger import Ledger
    from sapwood.observe.watchdog import Watchdog
    from sapwood.schema.config.scheduler import SchedulerConfig
    from sapwood.schema.request import Generate, RequestOptions

    logging.basicConfig(level="INFO")

    class StuckExecutor:
        def launch(self, plan):
            self.wait_for_a_kernel_that_never_ends()

        def wait_for_a_kernel_that_never_ends(self):
            {stuck}

    def another_thread():
        time.sleep(1000)

    threading.Thread(target=another_thread, daemon=True).start()
    config = SchedulerConfig(
        max_running_requests=4, max_queued_requests=4, chunked_prefill_size=16, overlap_depth=1
    )
    ledger = Ledger(num_pages=8, page_size=4, tree=None)
    clock = MonotonicClock()
    scheduler = Scheduler(
        config, ledger, context_length=32, vocab_size=9, eos_token_ids=(), clock=clock
    )
    channel = QueueChannel()
    watchdog = Watchdog(
        "the engine",
        soft_timeout_s={soft},
        hard_timeout_s={hard},
        on_stuck=lambda reason: print("TOLD:", reason, flush=True),
    )
    watchdog.start()
    loop = EngineLoop(
        scheduler,
        StuckExecutor(),
        channel,
        CallbackSender(lambda message: None),
        depth=1,
        clock=clock,
        instruments=Instruments(heartbeat=watchdog),
    )
    threading.Timer(
        1.0,
        lambda: channel.send(
            Generate(request_id="r", prompt_ids=[1, 2], options=RequestOptions())
        ),
    ).start()
    print("idle", flush=True)
    loop.run()
"""

HOLD_THE_INTERPRETER = "import ctypes; ctypes.PyDLL(None).sleep(1000)"
"""PyDLL keeps the interpreter's lock during the call: no other Python thread ever runs again."""


def run(script: str, **parts: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script).format(**parts)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_stuck_executor_is_reported_and_ended():
    # It idles for longer than the limit first, which is no fault.
    ended = run(STUCK_ENGINE, stuck="time.sleep(1000)", soft=0.2, hard=0.8)
    assert ended.returncode == EXIT_STUCK
    assert "idle" in ended.stdout
    assert "TOLD: the engine has got nowhere for 0.8 s (--watchdog-timeout)" in ended.stdout
    assert "wait_for_a_kernel_that_never_ends" in ended.stderr
    assert "another_thread" in ended.stderr
    # The soft limit comes first, and once.
    assert ended.stderr.count("every thread's stack follows") == 2


def test_an_executor_that_holds_the_interpreter_is_ended_too():
    ended = run(STUCK_ENGINE, stuck=HOLD_THE_INTERPRETER, soft=0, hard=0.6)
    assert ended.returncode == 1
    assert "wait_for_a_kernel_that_never_ends" in ended.stderr
    assert "another_thread" in ended.stderr


def test_start_up_is_watched():
    script = """
        import time
        from sapwood.observe.watchdog import Watchdog
        watchdog = Watchdog("the engine", soft_timeout_s=0, hard_timeout_s=0.6)
        watchdog.beat("importing torch")
        watchdog.start()
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            time.sleep(0.01)
            watchdog.beat("loading layers")

        def read_a_file_on_a_dead_disk():
            time.sleep(1000)

        print("alive after twice the limit", flush=True)
        read_a_file_on_a_dead_disk()
    """
    ended = run(script)
    assert ended.returncode == EXIT_STUCK
    assert "alive after twice the limit" in ended.stdout
    assert "while loading layers" in ended.stderr
    assert "read_a_file_on_a_dead_disk" in ended.stderr


def test_the_soft_watchdog_reports_each_silence_once_and_goes_on():
    script = """
        import time
        from sapwood.observe.watchdog import Watchdog
        watchdog = Watchdog("it", soft_timeout_s=0.2, hard_timeout_s=0)
        watchdog.start()
        for silence_s in (0.8, 0.8):
            watchdog.beat("thinking")
            time.sleep(silence_s)
        watchdog.rest()
        time.sleep(0.8)
        watchdog.stop()
    """
    ended = run(script)
    assert ended.returncode == 0
    assert ended.stderr.count("most recent call first") >= 2
    assert ended.stderr.count("it has got nowhere") == 2


def test_without_limits_there_is_no_thread():
    watchdog = Watchdog("it", soft_timeout_s=0, hard_timeout_s=0)
    watchdog.start()
    watchdog.beat("anything")
    assert watchdog._thread is None
    watchdog.stop()


def test_resting_is_known():
    watchdog = Watchdog("it", soft_timeout_s=0, hard_timeout_s=0)
    assert watchdog.is_resting
    watchdog.beat("working")
    assert not watchdog.is_resting
    watchdog.rest()
    assert watchdog.is_resting
