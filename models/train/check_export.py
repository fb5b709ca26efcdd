"""Check an F32 export against stock llama.cpp: same token ids as SentencePiece, same logits as PyTorch.

    python models/train/check_export.py --data DATA --work WORK [--model story-moe]

Needs the checkpoint of train_story.py in WORK, and llama-cpp-python. Exits with 1 when anything differs.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from corpus import held_out_stories
from export import write_gguf
from model import CONFIGS, Model
from train_story import HERE, load_tokens

LOGITS_TOLERANCE = 1e-3
AWKWARD_TEXTS = (
    "Once upon a time", " two  spaces   and three", "line\nbreak\n\nparagraph\n\n\n\"quoted\"",
    "caf\u00e9 \u4e16\u754c \U0001f600",
    "12345 + 3.14 = ?", "Tabs\tand * marks # here", "don't 'single' \"double\"", "", " ", "\n\nThe end.\n",
)


def differing_texts(llama: llama_cpp.Llama, tokenizer, texts: list[str]) -> list[str]:
    """The texts whose ids differ between llama.cpp and SentencePiece (BOS left out)."""
    return [text for text in texts
            if llama.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text)]


def largest_logit_difference(llama: llama_cpp.Llama, model: Model, ids: list[int]) -> float:
    """Over every position of `ids`; llama.cpp computes them in one batch."""
    llama.reset()
    llama.eval(ids)
    theirs = llama.scores[:len(ids)]
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    return float(np.abs(ours - theirs).max())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGEINFER_TEST_DATA"))
    parser.add_argument("--work", type=Path, default=HERE / "cache")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="story")
    arguments = parser.parse_args()
    config = CONFIGS[arguments.model]
    tokens = load_tokens(arguments.data / "text", arguments.work, config.vocab_size)
    model = Model(config).eval()
    model.load_state_dict(torch.load(arguments.work / f"{arguments.model}.pt", weights_only=True)["model"])
    stories = held_out_stories(arguments.data / "text")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "story-f32.gguf"
        write_gguf(model, tokens.tokenizer, path, arguments.model, "F32")
        llama = llama_cpp.Llama(
            str(path), n_ctx=config.context_length, n_batch=512, n_threads=2, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False)
        different = differing_texts(llama, tokens.tokenizer, [*AWKWARD_TEXTS, *stories])
        longest = sorted(tokens.held_out, key=len)[-4:]
        difference = max(
            largest_logit_difference(llama, model, ids[:config.context_length]) for ids in longest)
        llama.close()
    print(f"{len(AWKWARD_TEXTS) + len(stories)} texts tokenized, {len(different)} differ: {different[:5]}")
    print(f"largest difference of a logit: {difference:.2e} over {len(longest)} stories, "
          f"at most {LOGITS_TOLERANCE:g} is right")
    return 0 if not different and difference < LOGITS_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
