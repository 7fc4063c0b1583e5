"""Which tokens may come in the transcription of a sound."""

from __future__ import annotations

import msgspec


class SpeechRules(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The rules by which Whisper's decoder is used.

    suppressed  token ids that never come
    suppressed_first  token ids that are not the first of the output
    end         the token that ends a transcription; ids below it are text
    first_time  the id that stands for 0 s; each id after it for 0.02 s more. None: no times are
                wanted, and none comes
    latest_start  how many of such steps after 0 s the first time may be; None: any number

    Source: Radford et al. 2022, arXiv:2212.04356, sections 2.3 and 4.5.
    """

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    end: int
    first_time: int | None = None
    latest_start: int | None = None

    def token_ids(self) -> tuple[int, ...]:
        """All ids that it names, which the model must know."""
        first = () if self.first_time is None else (self.first_time,)
        return (*self.suppressed, *self.suppressed_first, self.end, *first)
