"""The held-out texts: natural ones that no training text of the built-in voice contains."""

from importlib import resources


def held_out(texts: str = "sentences") -> list[str]:
    """The texts, in order.

    Args:
        texts: "sentences", 200 short ones, or "prose", 40 with clauses, lists, numbers and names.
    """
    name = {"sentences": "held_out.txt", "prose": "held_out_prose.txt"}[texts]
    return resources.files("jaxspec.text").joinpath(name).read_text(encoding="utf-8").split("\n")[:-1]
