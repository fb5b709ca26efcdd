"""The story models' tests share: stock llama.cpp, the held-out stories, and measures of text and loss."""

import functools
import importlib.util
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("EDGEINFER_TEST_DATA")
needs_texts = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (the training texts) is not set")


@contextmanager
def stock_llama(path):
    """Stock llama.cpp on `path` with plain kernels (no repacking, which some virtual machines cannot run)."""
    module = llama_cpp.llama_cpp
    stock_default_params = module.llama_model_default_params

    def plain_params():
        params = stock_default_params()
        params.use_extra_bufts = False
        return params

    module.llama_model_default_params = plain_params
    try:
        llama = llama_cpp.Llama(
            str(path), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
        )
    finally:
        module.llama_model_default_params = stock_default_params
    try:
        yield llama
    finally:
        llama.close()


@functools.cache
def training_corpus():
    """Stories and held-out stories by the training script's own cleaning and split."""
    spec = importlib.util.spec_from_file_location("story_corpus", ROOT / "models" / "train" / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    try:
        spec.loader.exec_module(module)
        return module.read_corpus(Path(DATA) / "text", with_books=False)
    finally:
        del sys.modules[spec.name]


def held_out_tokens(llama):
    """Every fourth held-out story: BOS, text, EOS, cut at 512 tokens."""
    stories = training_corpus().held_out[::4]
    return [[*llama.tokenize(story.encode()), llama.token_eos()][:512] for story in stories]


def held_out_losses(llama):
    """Nats of every token of `held_out_tokens` but the first of each story."""
    losses = []
    for tokens in held_out_tokens(llama):
        llama.reset()
        llama.eval(tokens)
        logits = llama.scores[: len(tokens) - 1].astype(np.float64)
        largest = logits.max(axis=1)
        normaliser = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        losses.append(normaliser - logits[np.arange(len(tokens) - 1), tokens[1:]])
    return np.concatenate(losses)


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def assert_writes_words(llama, prompt, least_variety):
    """160 greedy tokens are words of the training stories; more than the share `least_variety` differ."""
    known = set()
    for story in training_corpus().stories:
        known.update(words_of(story))
    answer = llama.create_completion(prompt, max_tokens=160, temperature=0.0, repeat_penalty=1.0)
    words = words_of(answer["choices"][0]["text"])
    assert len(words) > 60
    assert sum(word in known for word in words) >= 0.95 * len(words)
    assert len(set(words)) > least_variety * len(words), "the text goes round in circles"
