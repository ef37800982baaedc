"""What the site of `make docs` is made of: README.md and all that can be reached from it by links.

The pages are written for a reader of the repository, so the site keeps the repository's layout, and
their relative links hold in both. mkdocs itself would take the files of one folder only.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from options_page import options_page

ROOT = Path(__file__).resolve().parent.parent
# Importing fairseq makes the root logger show everything; mkdocs has a logger of its own.
logging.basicConfig(level=logging.WARNING, force=True)

FIRST = "README.md"
OPTIONS = "docs/options.md"
# Neither an address, nor a place within the page, nor a path from the root of a file system.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#/\s][^)#\s]*)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's files in place of those that mkdocs found in docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in (*_reached(), *map(str, config.extra_css)):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, OPTIONS, content=options_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to folders to their README.md, which a code-hosting page shows with the folder."""
    folder = (ROOT / page.file.src_uri).parent
    return _LINK.sub(
        lambda link: posixpath.join(link[1], FIRST) if (folder / link[1]).is_dir() else link[1],
        markdown,
    )


def _reached() -> list[str]:
    """Paths of the pages, and of every file that they link to, in the repository."""
    reached = [FIRST]
    for path in reached:  # which grows
        if path.endswith(".md"):
            found = (_target(path, link) for link in _LINK.findall((ROOT / path).read_text()))
            reached += sorted({target for target in found if target} - set(reached))
    return reached


def _target(page: str, link: str) -> str | None:
    """What is meant, if the repository has it; mkdocs complains about what it has not."""
    target = (ROOT / page).parent.joinpath(link).resolve()
    if target.is_dir():
        target /= FIRST
    if not target.is_file() or not target.is_relative_to(ROOT):
        return None
    return target.relative_to(ROOT).as_posix()
