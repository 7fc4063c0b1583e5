"""A layer: a mixer, which looks at other tokens, and a feed-forward, which looks at each alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import Add, CannotRecord, Program, Scale
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.norm import Norm
from sapwood.layers.targets import Target, prefixed


class Mixer(Protocol):
    """Attention, or whatever else mixes tokens."""

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes what the new tokens leave behind to the caches."""
        ...

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """Like a call, with a pause before each linear layer.

        Yields the inputs of each linear layer, in the order in which `pack` packs them; the parts
        of one fused weight are one layer. A linear layer computes when the value after its inputs
        is asked for.
        Returns the result of the call. Raises ConfigError if there are no such inputs: if some
        tokens never reach some linear layer."""
        ...

    def targets(self) -> dict[str, Target]: ...

    def pack(self) -> None:
        """Pack the linear layers, once all weights are placed."""
        ...

    def record(self, program: Program, x: Buffer) -> Buffer:
        """Add the layer to a recorded step. Raises CannotRecord, or RuntimeError before `pack`."""
        ...


class FeedForward(Protocol):
    """As Mixer, without the other tokens."""

    @property
    def sends_rows(self) -> bool:
        """Whether it takes this rank's own rows where ranks have requests of their own, and sends
        them to others as need be."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def steps(self, x: Tensor) -> Generator[Tensor, None, Tensor]: ...

    def targets(self) -> dict[str, Target]: ...

    def pack(self) -> None: ...

    def record(self, program: Program, x: Buffer) -> Buffer: ...


class NamedNorm(NamedTuple):
    """A norm, and its name in the checkpoint."""

    name: str
    norm: Norm


B = TypeVar("B", Mixer, FeedForward)


class Stream(NamedTuple):
    """Hidden states of a recorded step; x has not been added to the residual, if there is one."""

    x: Buffer
    residual: Buffer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer(Generic[B]):
    """x + scale * after(body(before(x))), or with `over`, over(x + body(x)).

    name    the body's name in the checkpoint; "": its parts have names of their own
    before  norm of the inputs; None: there is none, as for the others
    after   norm of the result before it is added
    over    norm of the sum
    scale   factor of the result
    """

    name: str
    body: B
    before: NamedNorm | None = None
    after: NamedNorm | None = None
    over: NamedNorm | None = None
    scale: float = 1.0

    def normed(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(inputs of the body, sum of x and residual); a sum is fused with the norm after it."""
        if self.before is None:
            total = x if residual is None else x + residual
            return total, total
        if residual is None:
            return self.before.norm(x), x
        return self.before.norm.add(x, residual)

    def finished(self, out: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the body's result to hidden states, and a residual that is still to be added."""
        if self.after is not None:
            out = self.after.norm(out)
        if self.scale != 1.0:
            out = out * self.scale
        if self.over is not None:
            return self.over.norm.add(out, residual)[0], None
        return out, residual

    def targets(self) -> dict[str, Target]:
        found = prefixed(self.name, self.body.targets())
        for named in (self.before, self.after, self.over):
            if named is not None:
                found |= prefixed(named.name, named.norm.targets())
        return found

    def record(self, program: Program, stream: Stream) -> Stream:
        """As `normed`, the body and `finished`."""
        normed, residual = self.record_normed(program, stream)
        return self.record_finished(program, self.body.record(program, normed), residual)

    def record_normed(self, program: Program, stream: Stream) -> tuple[Buffer, Buffer]:
        """Add `normed` to a recorded step."""
        x, residual = stream
        if self.before is not None:
            normed = self.before.norm.record(program, x, residual)
        elif residual is not None:
            program.add(Add(x=x, residual=residual))
            normed = residual
        else:
            normed = x
        return normed, residual or x

    def record_finished(self, program: Program, out: Buffer, residual: Buffer) -> Stream:
        """Add `finished` to a recorded step."""
        if self.after is not None:
            out = self.after.norm.record(program, out)
        if self.scale != 1.0:
            program.add(Scale(residual=out, factor=self.scale))
        if self.over is not None:
            return Stream(self.over.norm.record(program, out, residual), None)
        return Stream(out, residual)


class Layer:
    """The mixer, then the feed-forward. What is added last is fused with the norm that follows."""

    def __init__(self, mixer: Sublayer[Mixer], feed_forward: Sublayer[FeedForward]) -> None:
        self._mixer = mixer
        self._feed_forward = feed_forward

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, hidden] and a residual that is not yet added to it -> both after this layer."""
        mixer, feed_forward = self._mixer, self._feed_forward
        normed, residual = mixer.normed(x, residual)
        x, residual = mixer.finished(mixer.body(normed, batch), residual)
        normed, residual = feed_forward.normed(x, residual)
        return feed_forward.finished(feed_forward.body(normed), residual)

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        """Like a call without a residual, with a pause before each linear layer (Mixer.steps); then
        yields the hidden states [T, hidden] after this layer."""
        mixer, feed_forward = self._mixer, self._feed_forward
        normed, total = mixer.normed(x, None)
        out = yield from mixer.body.steps(normed, batch)
        x, residual = mixer.finished(out, total)
        normed, total = feed_forward.normed(x, residual)
        out = yield from feed_forward.body.steps(normed)
        yield summed(*feed_forward.finished(out, total))

    def change_feed_forwards(self, change: Callable[[FeedForward], FeedForward]) -> None:
        """Put what `change` returns in the place of every feed-forward, in the order in which a
        call uses them. Raises ConfigError if some of them cannot be changed."""
        self._feed_forward = _changed(self._feed_forward, change)

    def targets(self) -> dict[str, Target]:
        return self._mixer.targets() | self._feed_forward.targets()

    def pack(self) -> None:
        self._mixer.body.pack()
        self._feed_forward.body.pack()

    def record(self, program: Program, stream: Stream) -> Stream:
        """Add the layer to a recorded step; x and residual as in a call."""
        return self._feed_forward.record(program, self._mixer.record(program, stream))


class PartialLayer(Layer):
    """A layer that lacks its mixer, its feed-forward, or both."""

    def __init__(
        self,
        *,
        mixer: Sublayer[Mixer] | None = None,
        feed_forward: Sublayer[FeedForward] | None = None,
    ) -> None:
        self._only_mixer = mixer
        self._only_feed_forward = feed_forward

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        if (mixer := self._only_mixer) is not None:
            normed, residual = mixer.normed(x, residual)
            x, residual = mixer.finished(mixer.body(normed, batch), residual)
        if (feed_forward := self._only_feed_forward) is not None:
            normed, residual = feed_forward.normed(x, residual)
            x, residual = feed_forward.finished(feed_forward.body(normed), residual)
        return x, residual

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        raise ConfigError("a layer without attention or feed-forward cannot be converted")

    def change_feed_forwards(self, change: Callable[[FeedForward], FeedForward]) -> None:
        if self._only_feed_forward is not None:
            self._only_feed_forward = _changed(self._only_feed_forward, change)

    def targets(self) -> dict[str, Target]:
        mixer = {} if self._only_mixer is None else self._only_mixer.targets()
        return mixer | (
            {} if self._only_feed_forward is None else self._only_feed_forward.targets()
        )

    def pack(self) -> None:
        if self._only_mixer is not None:
            self._only_mixer.body.pack()
        if self._only_feed_forward is not None:
            self._only_feed_forward.body.pack()

    def record(self, program: Program, stream: Stream) -> Stream:
        if self._only_mixer is not None:
            stream = self._only_mixer.record(program, stream)
        if self._only_feed_forward is not None:
            stream = self._only_feed_forward.record(program, stream)
        return stream


class ParallelLayer(Layer):
    """x + mixer(norm(x)) + feed_forward(norm(x)), where both may be scaled.

    The feed-forward has a norm of its own, or takes what the mixer takes. Source: Wang and
    Komatsuzaki 2021, GPT-J."""

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        normed, other, total = self._inputs(x, residual)
        total = summed(*self._mixer.finished(self._mixer.body(normed, batch), total))
        return self._feed_forward.finished(self._feed_forward.body(other), total)

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        normed, other, total = self._inputs(x, None)
        mixed = yield from self._mixer.body.steps(normed, batch)
        out = yield from self._feed_forward.body.steps(other)
        total = summed(*self._mixer.finished(mixed, total))
        yield summed(*self._feed_forward.finished(out, total))

    def _inputs(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs of the mixer, of the feed-forward, sum of x and residual)"""
        normed, total = self._mixer.normed(x, residual)
        before = self._feed_forward.before
        return normed, normed if before is None else before.norm(total), total

    def record(self, program: Program, stream: Stream) -> Stream:
        before, other = self._mixer.before, self._feed_forward.before
        if before is None:
            raise CannotRecord("a recorded step has no parallel layers without a norm")
        normed = before.norm.record(program, stream.x, stream.residual)
        total = stream.residual or stream.x
        # Made before the sum is changed: later ops read it.
        others = normed if other is None else other.norm.record(program, total)
        mixed = self._mixer.body.record(program, normed)
        program.add(Add(x=self._mixer.record_finished(program, mixed, total).x, residual=total))
        out = self._feed_forward.body.record(program, others)
        return self._feed_forward.record_finished(program, out, total)


class ShortcutLayer(Layer):
    """Two layers, and a feed-forward that takes what the first layer's takes; its result is added
    at the end. Source: Meituan LongCat Team 2025, arXiv:2509.01322."""

    def __init__(
        self,
        mixers: Sequence[Sublayer[Mixer]],
        feed_forwards: Sequence[Sublayer[FeedForward]],
        shortcut: tuple[str, FeedForward],
    ) -> None:
        """mixers, feed_forwards  of the two layers; shortcut: the third one and its name"""
        super().__init__(mixers[0], feed_forwards[0])
        self._second = Layer(mixers[1], feed_forwards[1])
        self._name, self._shortcut = shortcut

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        mixer, feed_forward = self._mixer, self._feed_forward
        normed, residual = mixer.normed(x, residual)
        x, residual = mixer.finished(mixer.body(normed, batch), residual)
        normed, residual = feed_forward.normed(x, residual)
        beside = self._shortcut(normed)
        x, residual = feed_forward.finished(feed_forward.body(normed), residual)
        x, residual = self._second(x, residual, batch)
        return beside, summed(x, residual)

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        raise ConfigError("a layer with a feed-forward beside two others cannot be converted")

    def change_feed_forwards(self, change: Callable[[FeedForward], FeedForward]) -> None:
        self._shortcut = change(self._shortcut)
        super().change_feed_forwards(change)
        self._second.change_feed_forwards(change)

    def targets(self) -> dict[str, Target]:
        shortcut = prefixed(self._name, self._shortcut.targets())
        return super().targets() | self._second.targets() | shortcut

    def pack(self) -> None:
        super().pack()
        self._second.pack()
        self._shortcut.pack()

    def record(self, program: Program, stream: Stream) -> Stream:
        feed_forward = self._feed_forward
        stream = self._mixer.record(program, stream)
        normed, residual = feed_forward.record_normed(program, stream)
        beside = self._shortcut.record(program, normed)
        out = feed_forward.body.record(program, normed)
        x, total = self._second.record(
            program, feed_forward.record_finished(program, out, residual)
        )
        if total is None:
            return Stream(beside, x)
        program.add(Add(x=x, residual=total))
        return Stream(beside, total)


class NormedResiduals(Layer):
    """Twice y = norm(x), and then a * y + b * body(y): what a body takes is also what it is added
    to. b is the sublayer's scale. Source: MiniMax 2025, arXiv:2501.08313."""

    def __init__(
        self,
        mixer: Sublayer[Mixer],
        feed_forward: Sublayer[FeedForward],
        *,
        residual_scales: tuple[float, float],
    ) -> None:
        """residual_scales: a of the mixer, and of the feed-forward"""
        super().__init__(mixer, feed_forward)
        self._residual_scales = residual_scales

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        first, second = self._residual_scales
        mixer, feed_forward = self._mixer, self._feed_forward
        y, _ = mixer.normed(x, residual)
        x = y * first + mixer.body(y, batch) * mixer.scale
        y, _ = feed_forward.normed(x, None)
        return y * second + feed_forward.body(y) * feed_forward.scale, None

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        first, second = self._residual_scales
        mixer, feed_forward = self._mixer, self._feed_forward
        y, _ = mixer.normed(x, None)
        mixed = yield from mixer.body.steps(y, batch)
        y, _ = feed_forward.normed(y * first + mixed * mixer.scale, None)
        out = yield from feed_forward.body.steps(y)
        yield y * second + out * feed_forward.scale

    def record(self, program: Program, stream: Stream) -> Stream:
        sublayers: tuple[Sublayer[Any], ...] = (self._mixer, self._feed_forward)
        for sublayer, residual_scale in zip(sublayers, self._residual_scales, strict=True):
            if sublayer.before is None:
                raise CannotRecord("a recorded step has no residuals without a norm")
            y = sublayer.before.norm.record(program, stream.x, stream.residual)
            out = sublayer.body.record(program, y)
            for buffer, factor in ((out, sublayer.scale), (y, residual_scale)):
                if factor != 1.0:
                    program.add(Scale(residual=buffer, factor=factor))
            program.add(Add(x=out, residual=y))
            stream = Stream(y, None)
        return stream


def _changed(
    sublayer: Sublayer[FeedForward], change: Callable[[FeedForward], FeedForward]
) -> Sublayer[FeedForward]:
    return replace(sublayer, body=change(sublayer.body))


def summed(x: Tensor, residual: Tensor | None) -> Tensor:
    """What a layer's result stands for."""
    return x if residual is None else x + residual
