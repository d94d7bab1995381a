"""What commands print: JSON only on standard output where it is asked for, cards for people, progress on standard error."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any


def report(card: str, result: Any, as_json: bool) -> None:
    """Prints a card; with ``as_json`` the card goes to standard error, and standard output is one JSON object."""
    print(card, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(result))


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (done, total) that draws a bar on standard error; it draws nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
