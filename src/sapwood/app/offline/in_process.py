"""An engine inside this process: its steps in one thread, its client's event loop in another."""

from __future__ import annotations

import atexit
import logging
import threading
from contextlib import suppress

from sapwood.app.building.loading import LoadWatch
from sapwood.app.building.resolving import Resolved
from sapwood.app.building.wiring import Engine, build_engine
from sapwood.app.offline.loop_thread import LoopThread
from sapwood.app.ranks.ranks import RankTeam
from sapwood.app.serving.engine_start import refuse_placement
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.errors import EngineUnavailable
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.instruments import Instruments
from sapwood.executor.profiler import TorchRecorder
from sapwood.observe.profiling import ProfileSession
from sapwood.schema.env import environment, home
from sapwood.schema.output import EngineOutput
from sapwood.schema.request import Drain, EngineInput
from sapwood.store.terminal import bar_on_terminal

log = logging.getLogger(__name__)

CLOSED = "this LLM was closed; make a new one"


class InProcessEngine:
    """Builds the engine and serves `client` from it until it is closed, or fails.

    channel  the channel into which `client` sends
    loop     the event loop of `client`, which must not be called from anywhere else

    At the interpreter's exit an open engine is closed: a thread that is stopped inside native code
    could crash the process.
    """

    def __init__(
        self, resolved: Resolved, channel: QueueChannel[EngineInput], client: AsyncEngineClient
    ) -> None:
        refuse_placement(resolved.asked)
        sender: CallbackSender[EngineOutput] = CallbackSender(self._deliver)
        watch = LoadWatch(progress=bar_on_terminal())
        self.loop = LoopThread("sapwood-loop", closed_reason=CLOSED)
        self._client = client
        self._channel = channel
        try:
            engine = build_engine(
                resolved,
                channel,
                sender,
                instruments=Instruments(profile=ProfileSession(TorchRecorder())),
                watch=watch,
                team=self._team(resolved),
            )
        except BaseException:
            self.loop.close()
            raise
        self._engine: Engine | None = engine
        self._thread = threading.Thread(
            target=self._serve, args=(engine,), name="sapwood-engine", daemon=True
        )
        self._deliver(engine.ready)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Abort open requests, end both threads and free the memory. May be called twice."""
        if self.loop.is_current:
            raise RuntimeError(
                "an LLM cannot be closed from its own event loop, such as from an on_finish "
                "function; close it from another thread"
            )
        with suppress(EngineUnavailable):
            self.loop.call(self._client.drain, 0.0)
        self._thread.join()
        if self._engine is not None:
            self._engine.close()
        self.loop.close()
        self._engine = None
        atexit.unregister(self.close)

    def _serve(self, engine: Engine) -> None:
        reason = CLOSED
        try:
            engine.run()
        except Exception as error:
            log.exception("the engine failed")
            reason = f"the engine failed: {type(error).__name__}: {error}"
        finally:
            # After a drain as well: a call that came too late must not wait for ever.
            self.loop.call(self._client.fail, reason)

    def _team(self, resolved: Resolved) -> RankTeam | None:
        """The other ranks of the model, in processes of their own."""
        if resolved.config.parallel.num_ranks == 1:
            return None

        def end(reason: str) -> None:
            self.loop.call(self._client.fail, f"the engine failed: {reason}")
            # An engine that has nothing to do hears of it by this.
            self._channel.send(Drain(0.0))

        return RankTeam(
            resolved.asked, home=home(environment()), log_level="warning", on_failed=end
        )

    def _deliver(self, message: EngineOutput) -> None:
        self.loop.call(self._client.deliver, message)
