"""The pages about checkpoints: every command parses, and the Python runs."""

import pathlib
import re
import shlex

import checkpoints
import commands
import pytest

from jaxspec.commands.convert import Convert
from jaxspec.commands.groups import Groups
from jaxspec.commands.info import Info
from jaxspec.commands.say import Say
from jaxspec.commands.voice import Voice

own_cache = commands.own_cache
PAGES = sorted((pathlib.Path(__file__).parent.parent / "docs" / "checkpoints").glob("*.md"))
LINES = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("jaxspec ")
]


def test_every_page_has_commands_and_says_what_is_verified():
    assert {name for name, _ in LINES} == {page.name for page in PAGES}
    assert len(PAGES) == 6
    for page in PAGES:
        verified = page.read_text(encoding="utf-8").split("## What is verified\n")[1]
        assert "real weights" in verified, page.name


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_parses(own_cache, monkeypatch, page, line):
    for command in (Convert, Info, Groups, Say, Voice):
        monkeypatch.setattr(command, "run", lambda parsed: print(type(parsed).__name__))
    words = shlex.split(line, comments=True)
    assert commands.run(*words[1:]) == (0, f"{words[1].title()}\n", "")


def test_the_python_runs(tmp_path, monkeypatch):
    checkpoints.converted(tmp_path, "llasa").rename(tmp_path / "llasa-1b")
    monkeypatch.chdir(tmp_path)
    index = next(page for page in PAGES if page.name == "index.md")
    (block,) = re.findall(r"```python\n(.*?)```", index.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(block, index.name, "exec"), names)
    assert names["draft"].params["table_0"] is names["target"].params["table_0"]
    assert names["draft"].drafter(4).length == 4
