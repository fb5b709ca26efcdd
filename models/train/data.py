"""Documents to tokens: train the tokenizer, encode the corpus, serve windows for batches."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece

from corpus import Corpus


def train_tokenizer(corpus: Corpus, vocab_size: int, path: Path) -> None:
    """Train a SentencePiece BPE model with byte fallback on the stories (three times) and the books.

    Line breaks stay inside the documents, so a break and the word after it become ordinary pieces.
    """
    documents = corpus.stories * 3 + corpus.books
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents), model_writer=file, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, split_digits=True, add_dummy_prefix=True,
            max_sentence_length=1 << 24, num_threads=2, minloglevel=1)


def encode(tokenizer: sentencepiece.SentencePieceProcessor, documents: list[str]) -> np.ndarray:
    """Token ids of all documents in one uint16 array, each as BOS, text, EOS."""
    stream: list[int] = []
    for ids in tokenizer.encode(documents):
        stream += [tokenizer.bos_id(), *ids, tokenizer.eos_id()]
    return np.array(stream, dtype=np.uint16)


class Windows:
    """Endless windows of `length` + 1 tokens from a stream: every epoch a new order and a new offset."""

    def __init__(self, stream: np.ndarray, length: int, seed: int):
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = (len(stream) - 1) // length - 1
        self.taken = 0  # windows taken so far: the whole state

    def take(self) -> np.ndarray:
        """The next window, shape (length + 1,)."""
        epoch, index = divmod(self.taken, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch))
        offset = int(order.integers(self.length))
        start = offset + int(order.permutation(self.per_epoch)[index]) * self.length
        self.taken += 1
        return self.stream[start:start + self.length + 1]

    @property
    def epochs(self) -> float:
        return self.taken / self.per_epoch
