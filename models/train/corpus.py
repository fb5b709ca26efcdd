"""The training text: TinyStories excerpts and children's books as clean plain documents.

Two sources: `stories` (TinyStories excerpts; the last 2 % of each file is held out for validation) and
`books` (public-domain children's books, one document a chapter).
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STORY_FILES = ("tinystories-1.txt", "tinystories-2.txt")
END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.02
# Books a child might be read; the other books are for adults and would only cost steps.
BOOK_PREFIXES = (
    "aesop-", "beatrix-potter-", "charles-dickens-a-christmas-carol", "edith-nesbit-",
    "frances-hodgson-burnett-a-little-princess", "frances-hodgson-burnett-the-secret-garden",
    "hans-christian-andersen-", "j-m-barrie-", "kenneth-grahame-", "l-frank-baum-", "lewis-carroll-",
    "louisa-may-alcott-jo-s-boys", "louisa-may-alcott-little-", "louisa-may-alcott-an-old-fashioned-girl",
    "lucy-maud-montgomery-",
)
# Quotation marks and dashes, also those that were decoded with the wrong code page upstream.
REPLACEMENTS = {
    "\u00e2\u20ac\u00a6": "...", "\u00e2\u20ac\u0153": '"', "\u00e2\u20ac\u2122": "'", "\u00e2\u20ac": '"',
    "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'",
    "\u2014": "--", "\u2013": "-", "\u2026": "...", "\u00a0": " ", "\u00e6": "ae",
}


def plain(text: str) -> str:
    """`text` with plain quotation marks, single spaces and a blank line between paragraphs."""
    for old, new in REPLACEMENTS.items():
        text = text.replace(old, new)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r" ?\n[ \n]*", "\n\n", text).strip()


def split_stories(text: str) -> list[str]:
    """The stories of one TinyStories file.

    One form has `<|endoftext|>` between stories and a line a paragraph; the other has blank lines between
    paragraphs and a single line break between stories.
    """
    if END_OF_TEXT in text:
        parts = text.split(END_OF_TEXT)
    else:
        parts = []
        for part in re.split(r"(?<!\n)\n(?!\n)", text):
            if parts and len(part) < 80:  # a stray line break inside a story
                parts[-1] += "\n" + part
            else:
                parts.append(part)
    return [story for story in map(plain, parts) if len(story) >= 80]


def split_book(text: str) -> list[str]:
    """The chapters of a Markdown book as plain text; title, author, headings and marks are dropped."""
    text = text.replace("\r\n", "\n").split("-------\n", 1)[-1]
    chapters = []
    for chapter in re.split(r"(?m)^#+ .*$", text):
        chapter = re.sub(r"(?m)^(\* ){2,}\*.*$|^[-_* ]+$|^> ?", "", chapter)
        chapter = re.sub(r"\[[^\]\n]*\]|[*_\\|#]", "", chapter)
        paragraphs = [re.sub(r"\s+", " ", paragraph) for paragraph in re.split(r"\n\s*\n", chapter)]
        chapter = plain("\n".join(paragraphs))
        if len(chapter) >= 200:
            chapters.append(chapter)
    return chapters


@dataclass(frozen=True)
class Corpus:
    """Cleaned documents: stories to train on, stories held out, book chapters."""

    stories: list[str]
    held_out: list[str]
    books: list[str]


def held_out_stories(text_folder: Path) -> list[str]:
    """The stories in the last 2 % (by characters) of each TinyStories file; never trained on."""
    return read_corpus(text_folder, with_books=False).held_out


def read_corpus(text_folder: Path, with_books: bool = True) -> Corpus:
    """Read and clean the texts below `text_folder`; raises FileNotFoundError when a source is missing."""
    stories: list[str] = []
    held_out: list[str] = []
    for name in STORY_FILES:
        file_stories = split_stories((text_folder / name).read_text(encoding="utf-8"))
        left = HELD_OUT * sum(map(len, file_stories))
        cut = len(file_stories)
        while left > 0:
            cut -= 1
            left -= len(file_stories[cut])
        stories += file_stories[:cut]
        held_out += file_stories[cut:]
    # The same story twice would let the validation loss praise memory.
    seen = set(held_out)
    stories = [story for story in dict.fromkeys(stories) if story not in seen]
    books: list[str] = []
    if with_books:
        for path in sorted((text_folder / "books").glob("*.md")):
            if path.name.startswith(BOOK_PREFIXES):
                books += split_book(path.read_text(encoding="utf-8"))
        if not books:
            raise FileNotFoundError(
                f"expected the Markdown books in {text_folder / 'books'}, found none that is used")
    return Corpus(stories, held_out, books)
