"""An extension of the API pages: what the code says in doctests and in comments beside fields becomes part of the pages."""

import re

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?|^\.\.\. .*\n?)*)+", re.MULTILINE)
_COMMENT = re.compile(r"#\s+(.+)$")


class Docs(griffe.Extension):
    """Puts a fence around doctests, and takes the comment beside a field for its docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrites the docstring of a module, class, function or attribute."""
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = _DOCTEST.sub(lambda block: f"```pycon\n{block[0].rstrip()}\n```\n", obj.docstring.value)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        """Documents a field, or a constant, from its line."""
        comment = _COMMENT.search(attr.lines[-1]) if attr.lines and attr.docstring is None else None
        if comment:
            attr.docstring = griffe.Docstring(comment[1], parent=attr)
