"""The embedded sample of Wikipedia."""

from __future__ import annotations

import bz2
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

from saelab.data.text.files import digest_of
from saelab.data.text.source import Pieces, TextSource, counted
from saelab.errors import UserError

WIKI_SAMPLE = "wiki-sample"


def open_wikipedia() -> TextSource:
    """106 articles that come with gensim."""
    spec = importlib.util.find_spec("gensim")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [f for d in folders for f in Path(d, "test", "test_data").glob("enwiki-latest-pages-articles1.xml*.bz2")]
    if not found:
        raise UserError("wiki-sample comes with gensim, which is not installed; pip install 'saelab[demo]'")
    return counted(WIKI_SAMPLE, digest_of(found[:1]), lambda left_out: _articles(found[0], left_out))


def _articles(path: Path, left_out: Counter[str]) -> Pieces:
    from gensim.corpora import wikicorpus

    extract_pages: Any = wikicorpus.extract_pages
    with bz2.open(path, "rb") as file:
        for title, markup, _ in extract_pages(file, filter_namespaces=("0",)):
            if markup.lstrip().upper().startswith("#REDIRECT"):
                continue
            text = re.sub("'{2,}", "", wikicorpus.filter_wiki(markup))  # bold and italics, which gensim leaves
            text = re.sub(r"[ \t\xa0]*\n\s*\n\s*", "\n\n", text).strip()  # holes where tables and images were
            if text:
                yield True, f"{title}\n\n{text}"
