"""Hooks of the documentation's build: links out of docs/ (pictures, tables, examples) work on GitHub and on the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of docs/ that pages link to, under their path in the repository."""
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(page.content_string):
            name = _outside(page.src_uri, target)
            if name and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links out of docs/ to these files."""

    def replace(link: re.Match[str]) -> str:
        name = _outside(page.file.src_uri, link[0])
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".") if name else link[0]

    return _LINK.sub(replace, markdown)


def _outside(page: str, target: str) -> str | None:
    """The path in the repository of a link on a page, if it leads out of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path
