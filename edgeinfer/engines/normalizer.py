"""What a tokenizer does to a text before it is cut into tokens, where llama.cpp has no such step.

An exported GGUF file says it under a key of edgeinfer's own, which other programs pass over.
"""

from __future__ import annotations

import unicodedata

NORMALIZER_KEY = "edgeinfer.normalizer"
COMPOSED = "NFC"  # letters and their combining marks as one character where there is one


def normalized(text: str, normalizer: str | None) -> str:
    """`text` as the vocabulary with this `normalizer` wants it; as it is for None and what is not known."""
    return unicodedata.normalize(COMPOSED, text) if normalizer == COMPOSED else text
