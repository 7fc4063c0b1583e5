"""Random numbers that depend on a request's seed and on nothing else in the batch.

Counter-based: the number for output token i of a request is a hash of (seed, i). So the number is
the same after a retraction, in another batch, and on another rank.
Source: the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ACCEPTANCE = np.uint64(0xA5A5_1F3D_5C0B_E947)
"""Changes a seed, so that a request has a second number for each token; any constant would do."""
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, counter), all arrays [n]."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds + _GOLDEN) + (counters + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def acceptance_numbers(
    seeds: NDArray[np.uint64], counters: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """As `uniforms`, but other numbers: those that decide whether a guess is taken. A draft model
    draws its guess by the first number, so that the first number says something about the guess."""
    return uniforms(seeds ^ _ACCEPTANCE, counters)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))
