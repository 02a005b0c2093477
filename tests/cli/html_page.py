"""Reads a page as a browser would: for the tests of reports."""

from __future__ import annotations

import re
from html.parser import HTMLParser

OUTSIDE = re.compile(r"https?:|url\(|@import|<link|<script|<img| src=")  # what a page that stands alone has not


class Page(HTMLParser):
    """The tags of a page, its text, and the tags that were never closed."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def cells(self) -> list[str]:
        """The titles of the pictures' cells."""
        classes = [(attributes, (attributes.get("class") or "").split()) for _, attributes in self.tags]
        return [attributes["title"] or "" for attributes, names in classes if "cell" in names and "title" in attributes]
