"""Writes the two bundled tasks of verify.accuracy from a public-domain novel: python -m tests.models.tasks BOOK.txt"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

PLACE = Path(__file__).parents[2] / "verify" / "accuracy" / "bundled"
#: Samples of each task.
SAMPLES = 300


def passages(book: str) -> list[str]:
    """The paragraphs of a Project Gutenberg text between its header and its trailer, in one line each."""
    body = book.partition("*** START")[2].partition("***")[2].partition("*** END")[0] or book
    body = re.sub(r"\[[^\]]*\]|_", "", body.replace("\r", ""))
    found = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", body))
    return [text for text in found if len(text.split()) >= 40 and text[0] not in "[(" and text.isprintable()]


def cloze(texts: list[str], draw: random.Random) -> list[dict[str, str]]:
    """A passage cut before a long word that stands in it once before, so that the context tells it; one per paragraph."""
    found = []
    for text in texts:
        words = text.split()
        fit = [
            end
            for end in range(40, min(len(words), 110))
            if re.fullmatch(r"[a-z]{5,}[.,;:!?]?", words[end])
            and words[end].rstrip(".,;:!?") in words[max(0, end - 40) : end]
        ]
        if fit:
            end = draw.choice(fit)
            found.append({"text": " ".join(words[:end]), "word": words[end].rstrip(".,;:!?")})
    return draw.sample(found, min(SAMPLES, len(found)))


def choices(texts: list[str], draw: random.Random) -> list[dict[str, object]]:
    """The beginning of a passage and four endings of about ten words; three are from elsewhere in the book."""
    cut = [(words[:-10], words[-10:]) for words in (text.split() for text in texts) if 50 <= len(words) <= 160]
    found: list[dict[str, object]] = []
    for start, ending in draw.sample(cut, min(SAMPLES, len(cut))):
        others = draw.sample([other for _, other in cut if other != ending], 3)
        endings = [" ".join(words) for words in (ending, *others)]
        draw.shuffle(endings)
        found.append({"text": " ".join(start[-60:]), "endings": endings, "label": endings.index(" ".join(ending))})
    return found


def main(book: str) -> None:
    texts = passages(Path(book).read_text(encoding="utf-8"))
    for name, make in (("cloze", cloze), ("choices", choices)):
        rows = make(texts, random.Random(0))
        lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
        (PLACE / f"{name}.jsonl").write_text(lines)
        print(f"{name}: {len(rows)} samples, {len(lines):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
