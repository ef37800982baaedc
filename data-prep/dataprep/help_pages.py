"""Reads LibreOffice's manual out of Debian packages and aligns it, paragraph by paragraph.

The manual's pages are made from one source for all languages. Each package holds them in one
language, and a paragraph, heading or table cell has the same id in all of them: a pair is what two
languages say under one id of one page.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from lxml import etree, html

from dataprep import DataPrepError
from dataprep.packages import read_members
from dataprep.pairs import Pair

_PAGE = re.compile(r"usr/share/libreoffice/help/(?P<folder>[^/]+)/(?P<page>text/.+\.html)")
_TEXT_ID = re.compile(r"(par|hd|tit)_")
_CODE_CLASSES = {"code", "codeintable", "input", "literal", "smathcode", "smathcodeintable"}


@dataclass(frozen=True)
class AlignedPages:
    """The pairs of two packages, and how many paragraphs were left out.

    Attributes:
        pairs: page by page in the order of their paths, within a page as the first language has
            them. White space is single spaces.
        left_out: numbers of paragraphs, by the reason.
    """

    pairs: list[Pair]
    left_out: dict[str, int]


@dataclass(frozen=True)
class _Paragraph:
    text: str
    is_code: bool


# The different paragraphs that a page has under each id.
_Page = dict[str, set[_Paragraph]]


def read_pages(first: Path, second: Path, languages: tuple[str, str]) -> AlignedPages:
    """Read all aligned pairs of two packages.

    Left out are, under these names, paragraphs that one language lacks ("unpaired"), those whose
    id has several texts on one page ("ambiguous"), and those that are nothing but code ("code").
    Ids are ambiguous on pages that show sections of other pages. Nothing but their order says
    which of the texts belong together, and a translator may change it; where the sections come
    from, their ids are unique.

    Args:
        first: the package in the first language.
        second: the package in the second language.
        languages: their codes, such as "de", "en" (or "en-us") and "pt-br".

    Raises:
        DataPrepError: a package cannot be read, or does not hold the pages in its language.
    """
    ours, theirs = _read_package(first, languages[0]), _read_package(second, languages[1])
    pairs: list[Pair] = []
    left_out = Counter(unpaired=0, ambiguous=0, code=0)
    for name in sorted(ours.keys() | theirs.keys()):
        page, other = ours.get(name, {}), theirs.get(name, {})
        for identifier in dict.fromkeys((*page, *other)):
            sides = page.get(identifier, set()), other.get(identifier, set())
            reason = _reason_to_leave_out(*sides)
            if reason is not None:
                left_out[reason] += 1
                continue
            (paragraph,), (translation,) = sides
            pairs.append(Pair(paragraph.text, translation.text))
    return AlignedPages(pairs, dict(left_out))


def _reason_to_leave_out(first: set[_Paragraph], second: set[_Paragraph]) -> str | None:
    if not first or not second:
        return "unpaired"
    if len(first) > 1 or len(second) > 1:
        return "ambiguous"
    if any(paragraph.is_code for paragraph in first | second):
        return "code"
    return None


def _read_package(path: Path, language: str) -> dict[str, _Page]:
    """The pages in a package by their path below the language's folder."""
    pages: defaultdict[str, dict[str, _Page]] = defaultdict(dict)
    for name, content in read_members(path, lambda name: bool(_PAGE.fullmatch(name))):
        match = _PAGE.fullmatch(name)
        assert match is not None  # no others are read
        folder, page = match.groups()
        try:
            pages[folder][page] = _read_page(content)
        except etree.ParserError as error:
            raise DataPrepError(f"{name} in {path} is not a page of HTML: {error}.") from error
    folders = [folder for folder in pages if _is_in(folder, language)]
    if len(folders) != 1:
        raise DataPrepError(
            f"{path} is not LibreOffice's help in {language!r}: it has pages in "
            f"{', '.join(sorted(pages)) or 'no language'}. Take the package "
            "libreoffice-help-LANGUAGE of Debian or Ubuntu."
        )
    return pages[folders[0]]


def _is_in(folder: str, language: str) -> bool:
    """Whether a folder's name, such as "en-US", is of a language, "en" or "en-us"."""
    return f"{folder}-".lower().startswith(f"{language}-".lower())


def _read_page(content: bytes) -> _Page:
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    page: _Page = defaultdict(set)
    for element in html.document_fromstring(content, parser=parser).iter():
        if _TEXT_ID.match(element.get("id", "")):
            paragraph = _Paragraph(" ".join(_text(element).split()), _is_code(element))
            page[element.get("id")].add(paragraph)
    return page


def _text(element: html.HtmlElement, prose_only: bool = False) -> str:
    """What an element says: without code if only the prose in it is wanted."""
    if element.get("class") == "bug":  # "[... not found]", where a section could not be shown
        return ""
    if prose_only and element.get("class") in _CODE_CLASSES:
        return ""
    if element.tag == "br":
        return " "
    text = element.text or ""
    for child in _shown(element):
        text += _text(child, prose_only) + (child.tail or "")
    return text


def _shown(element: html.HtmlElement) -> list[html.HtmlElement]:
    """An element's children, but of text that differs by system or program one variant only.

    Classes name the variants. First by class is the default, which has none, or else the same
    variant in all languages.
    """
    children = list(element)
    if element.get("class") == "switchinline":
        return sorted(children, key=lambda child: child.get("class", ""))[:1]
    return children


def _is_code(element: html.HtmlElement) -> bool:
    """Whether there are letters in an element, but in code alone.

    Code in a sentence is used as a name, and without it the sentence would make no sense.
    """
    if next(element.iterancestors("pre"), None) is not None:
        return True
    return not _has_letter(_text(element, prose_only=True)) and _has_letter(_text(element))


def _has_letter(text: str) -> bool:
    return any(character.isalpha() for character in text)
