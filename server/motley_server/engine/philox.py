"""The source of the sampler's randomness: a counter-based generator.

A token's number depends on nothing but its seed, candidate and position. Knows no tensors and keeps no state; pure
integer arithmetic, safe on any thread.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Words4 = tuple[int, int, int, int]


def philox4x32(counter: Words4, key: tuple[int, int]) -> Words4:
    """Turn a counter of four 32-bit words into four random ones under a key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32, 10 rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & _MASK, (left >> 32) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def token_uniform(seed: int, candidate: int, position: int) -> float:
    """Return the uniform number in [0, 1) that decides one token.

    Semantics: 53 random bits; `seed` counts modulo 2**64, `position` is how many tokens the candidate already has.
    """
    words = philox4x32((position & _MASK, candidate & _MASK, 0, 0), (seed & _MASK, (seed >> 32) & _MASK))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53
