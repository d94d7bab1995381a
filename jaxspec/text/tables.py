"""Tables written as text, which is the shortest to read and to add to."""


def pairs(text: str) -> dict[str, str]:
    """A dictionary of ``key=value`` pairs.

    >>> pairs("dr=doctor, e.g=for example")
    {'dr': 'doctor', 'e.g': 'for example'}
    """
    return dict(pair.split("=") for pair in text.split(", "))
