"""A made vocabulary of the SentencePiece kind, of any size.

Any text is tokenized (ASCII characters, else bytes) and comes back unchanged; the rest are made-up words.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import NamedTuple

UNKNOWN, BEGIN, END = 0, 1, 2
NUM_SPECIAL = 3 + 256  # unknown, begin, end, and one token a byte
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # llama.cpp's token types
_SPACE = "\u2581"


class Vocabulary(NamedTuple):
    tokens: list[str]
    scores: list[float]
    types: list[int]


def _pieces() -> Iterator[str]:
    yield _SPACE
    yield from map(chr, range(0x21, 0x7F))
    syllables = [a + b for a, b in product("bcdfghjklmnpqrstvwxyz", "aeiou")]
    for length in (1, 2, 3):
        for word in map("".join, product(syllables, repeat=length)):
            yield word
            yield _SPACE + word


def make_vocabulary(size: int) -> Vocabulary:
    """A vocabulary of `size` tokens; ValueError below 354 (special, bytes, ASCII) or above 2 million."""
    smallest = NUM_SPECIAL + 95
    if not smallest <= size <= 2_000_000:
        raise ValueError(f"expected a vocabulary of {smallest} to 2,000,000 tokens, found {size}")
    pieces = list(islice(_pieces(), size - NUM_SPECIAL))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * NUM_SPECIAL + [-float(rank) for rank in range(len(pieces))]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * len(pieces)
    return Vocabulary(tokens, scores, types)
