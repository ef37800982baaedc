"""Reads LibreOffice's manual out of Debian packages and aligns it, paragraph by paragraph.

The manual's pages are made from one source for all languages. Each package holds them in one
language, and a paragraph, heading or table cell has the same id in all of them: a pair is what two
languages say under one id of one page.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from lxml import html

from dataprep import DataPrepError, Pair

_PAGE = re.compile(r"usr/share/libreoffice/help/(?P<folder>[^/]+)/(?P<page>text/.+\.html)")
_TEXT_ID = re.compile(r"(par|hd|tit)_")
_CODE_CLASSES = {"code", "codeintable", "input", "literal", "smathcode", "smathcodeintable"}


class _Paragraph(NamedTuple):
    text: str
    is_code: bool


# The different paragraphs that a page has under each id.
_Page = dict[str, set[_Paragraph]]


def is_page(name: str) -> bool:
    """Whether a file of a package is a page of the manual."""
    return _PAGE.fullmatch(name) is not None


def read_pages(
    first: Mapping[str, bytes], second: Mapping[str, bytes], languages: tuple[str, str]
) -> tuple[list[Pair], dict[str, int]]:
    """Read all aligned pairs of two packages, and count the paragraphs that are left out.

    Pairs come page by page in the order of their paths, within a page as the first language has
    them. White space is single spaces. Left out are, under these names, paragraphs that one
    language lacks ("unpaired"), those whose id has several texts on one page ("ambiguous"), and
    those that are nothing but code ("code"). Ids are ambiguous on pages that show sections of
    other pages. Nothing but their order says which of the texts belong together, and a translator
    may change it; where the sections come from, their ids are unique.

    Args:
        first: the pages of the package in the first language, by their names there.
        second: those in the second language.
        languages: their codes, such as "de", "en" (or "en-us") and "pt-br".

    Raises:
        DataPrepError: the pages are not in their language.
    """
    ours, theirs = _read_package(first, languages[0]), _read_package(second, languages[1])
    pairs: list[Pair] = []
    left_out = Counter(unpaired=0, ambiguous=0, code=0)
    for name in sorted(ours.keys() | theirs.keys()):
        page, other = ours.get(name, {}), theirs.get(name, {})
        for identifier in dict.fromkeys((*page, *other)):
            sides = page.get(identifier, set()), other.get(identifier, set())
            if not all(sides):
                left_out["unpaired"] += 1
            elif any(len(side) > 1 for side in sides):
                left_out["ambiguous"] += 1
            else:
                (paragraph,), (translation,) = sides
                if paragraph.is_code or translation.is_code:
                    left_out["code"] += 1
                else:
                    pairs.append(Pair(paragraph.text, translation.text))
    return pairs, dict(left_out)


def _read_package(files: Mapping[str, bytes], language: str) -> dict[str, _Page]:
    """The pages by their path below the language's folder."""
    pages: defaultdict[str, dict[str, _Page]] = defaultdict(dict)
    for name, content in files.items():
        if match := _PAGE.fullmatch(name):
            pages[match["folder"]][match["page"]] = _read_page(content)
    folders = [folder for folder in pages if _is_in(folder, language)]
    if len(folders) != 1:
        raise DataPrepError(
            f"A package is not LibreOffice's help in {language!r}: it has pages in "
            f"{', '.join(sorted(pages)) or 'no language'}."
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
