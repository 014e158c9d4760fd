"""What the documents say of the code: links, paths and quoted messages are those of today, recipes in them load."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from recipes.loader import load_recipe

ROOT = Path(__file__).parents[2]
FOLDERS = ("calibration", "verify", "workflows", "recipes", "tests", "docs")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")])
#: Their paths and names are those of the day on which an entry was written.
HISTORY = {"CHANGELOG.md", "diary.md"}
CURRENT = [path for path in DOCUMENTS if path.name not in HISTORY]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def anchors(path: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub spells them."""
    titles = re.findall(r"^#+ (.*)", FENCE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def messages() -> tuple[str, ...]:
    """Every text in the code, with `\\0` for each value that is put into it."""
    found = []
    for folder in ("calibration", "verify", "workflows", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    found.append(node.value)
    return tuple(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_page_and_a_heading_that_exist(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        name, _, fragment = target.partition("#")
        if name.startswith(("https:", "http:")):
            continue
        page = (path.parent / name).resolve() if name else path
        if not page.exists() or (fragment and page.suffix == ".md" and fragment not in anchors(page)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_path_that_a_document_names_exists(path: Path) -> None:
    named = re.findall(rf"(?<![\w/.<-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?)", FENCE.sub("", text_of(path)))
    assert not [name for name in dict.fromkeys(named) if "NAME" not in name and not (ROOT / name).exists()]


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_module_that_a_command_starts_exists(path: Path) -> None:
    modules = re.findall(rf"-m ((?:{'|'.join(FOLDERS)})[\w.]*\w)", text_of(path))
    places = {name: ROOT.joinpath(*name.split(".")) for name in modules}
    assert not [
        n for n, at in places.items() if not (at / "__main__.py").exists() and not at.with_suffix(".py").exists()
    ]


def test_every_message_in_troubleshooting_is_one_of_the_code() -> None:
    rows = re.findall(r"^\| (`.*?) \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"``(.*?)``(?!`)|(?<!`)`([^`]+)`(?!`)", row)]
    patterns = {
        quote: ".*".join(map(re.escape, re.split(r"\s?\.\.\.\s?", quote.strip()))) for quote in map("".join, quoted)
    }
    assert len(rows) >= 20
    lost = [q for q, pattern in patterns.items() if not any(re.search(pattern, m, re.DOTALL) for m in messages())]
    assert not lost, "the code no longer says so: quote what it says now"


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_every_recipe_in_a_document_loads(path: Path, tmp_path: Path) -> None:
    for language, block in FENCE.findall(text_of(path)):
        if language == "yaml" and {"source:", "output:"} <= set(re.findall(r"^\w+:", block, re.MULTILINE)):
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(block, encoding="utf-8")
            load_recipe(recipe)


def test_architecture_names_every_module_and_no_other() -> None:
    text = text_of(ROOT / "docs" / "architecture.md")
    files = [path for folder in FOLDERS[:4] for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    named = set(re.findall(r"`(?!tests/)(?:\w+/)*(\w+\.py)`", text))
    assert {path.name for path in files} == named


def test_the_readme_stays_two_screens_of_short_sentences() -> None:
    """Details belong in docs/."""
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 120
    prose = re.sub(r"(?m)^(?:    |\||#).*$", "", FENCE.sub("", text))
    sentences = re.split(r"(?<=[.:?!])\s+|\n\s*\n|\n- ", re.sub(r"\]\([^)]*\)", "]", prose))
    assert not [sentence for sentence in sentences if len(sentence.split()) > 25]
