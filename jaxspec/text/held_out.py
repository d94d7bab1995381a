"""The held-out sentences: natural ones that no training text of the built-in voice contains."""

from importlib import resources


def held_out() -> list[str]:
    """The 200 sentences, in order."""
    return resources.files("jaxspec.text").joinpath("held_out.txt").read_text(encoding="utf-8").split("\n")[:-1]
