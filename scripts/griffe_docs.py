"""An extension of the API pages: what the code says in doctests and in comments beside fields becomes part of the pages."""

import re

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?|^\.\.\. .*\n?)*)+", re.MULTILINE)
_COMMENT = re.compile(r"#\s+(.+)$")


class Docs(griffe.Extension):
    """Puts a fence around doctests, and lists fields with the comments beside them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrites the docstring of a module, class, function or attribute."""
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = _DOCTEST.sub(lambda block: f"```pycon\n{block[0].rstrip()}\n```\n", obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Lists the commented fields of a class under Attributes."""
        fields = {name: _comment(member) for name, member in cls.attributes.items()}
        lines = [f"    {name}: {comment}" for name, comment in fields.items() if comment]
        if cls.docstring and lines and "Attributes:" not in cls.docstring.value:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def _comment(attribute: griffe.Attribute) -> str | None:
    """The comment at the end of an attribute's line."""
    found = _COMMENT.search(attribute.lines[-1]) if attribute.lines and attribute.docstring is None else None
    return found and found[1]
