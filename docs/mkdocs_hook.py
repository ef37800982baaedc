"""What the site of `make docs` is made of: the files of the repository.

The pages are written for a reader of the repository, so the site keeps the repository's layout, and
their relative links hold in both. mkdocs itself would take the files of one folder only.
"""

from __future__ import annotations

import logging
import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from options_page import options_page

ROOT = Path(__file__).resolve().parent.parent
# Importing fairseq makes the root logger show everything; mkdocs has a logger of its own.
logging.basicConfig(level=logging.WARNING, force=True)

# Neither an address nor a place within the page.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's files in place of those that mkdocs found in docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.splitlines():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "docs/options.md", content=options_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to folders to their README.md, which a code-hosting page shows with the folder."""
    folder = (ROOT / page.file.src_uri).parent
    return _LINK.sub(
        lambda link: (
            posixpath.join(link[1], "README.md") if (folder / link[1]).is_dir() else link[1]
        ),
        markdown,
    )
