"""The list of the files that `say --file` has written, by which a run that was interrupted is resumed."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from jaxspec.common import hosts

MANIFEST = "manifest.jsonl"


def digest(request: dict[str, Any], files: list[Path | None]) -> str:
    """A digest of all that a file depends on: the request, and the contents of other files."""
    contents = [path.read_bytes().hex() if path is not None and path.is_file() else "" for path in files]
    return hashlib.sha256(json.dumps([request, contents], sort_keys=True, default=str).encode()).hexdigest()


class Manifest:
    """One line of JSON for each file: its name, the line and the text that it speaks, and the digest of its request."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST

    def holds(self, name: str, request: str) -> bool:
        """Whether a file is there and was written for this request."""
        return self._requests.get(name) == request and (self.folder / name).is_file()

    @functools.cached_property
    def _requests(self) -> dict[str, str]:
        requests = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                entry = json.loads(line)
                requests[entry["file"]] = entry["request"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut off
        return requests

    def add(self, name: str, line: int, text: str, request: str) -> None:
        """Records a file that was just written, on the first host."""
        if not hosts.is_first():
            return
        self.__dict__.pop("_requests", None)  # read again when it is next asked for
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "line": line, "text": text, "request": request}, ensure_ascii=False) + "\n")
