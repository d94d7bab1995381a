"""The documentation: its commands parse, its Python runs, its links lead somewhere, and its figures are those of results/."""

import json
import pathlib
import re
import shlex

import pytest

from jaxspec.commands import main

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
SCRIPTS = ("bash", "cd", "for", "pip", "pytest", "python", "ruff", "mkdocs", "apt-get", "git", "pyright")
OWN_TESTS = ("docs/checkpoints/index.md",)  # its Python needs a checkpoint, which test_convert_docs makes


def shell_lines(text):
    """The commands of a page: lines of blocks marked ``sh``, and of indented blocks that begin with ``jaxspec``."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from (line for line in block.splitlines() if line.strip() and not line.startswith("#"))
    without = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (line.strip() for line in re.findall(r"^ {4}jaxspec .*$", without, re.MULTILINE))


def python_blocks(text):
    """The blocks of Python that run, in order; a comment ``<!-- not run: why -->`` before a block excludes it."""
    found = re.findall(r"(<!-- not run: [^>]+-->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [block for excluded, block in found if not excluded]


SHELL = [(name, line) for name, text in TEXT.items() for line in shell_lines(text)]
JAXSPEC = [(name, line) for name, line in SHELL if line.startswith("jaxspec ")]
PYTHON = {name: python_blocks(text) for name, text in TEXT.items() if name not in (*OWN_TESTS, "README.md")}


def test_blocks_are_found():
    page = "```sh\njaxspec a\n# b\n```\n    jaxspec c\n<!-- not run: d -->\n```python\ne\n```\n```python\nf\n```\n"
    assert list(shell_lines(page)) == ["jaxspec a", "jaxspec c"]
    assert python_blocks(page) == ["f\n"]
    assert len(JAXSPEC) > 30
    assert sum(map(len, PYTHON.values())) > 6


@pytest.mark.parametrize(("page", "line"), sorted(set(JAXSPEC)))
def test_a_command_parses(page, line):
    line = re.sub(r"\s[<>]\s+\S+", "", line)  # a redirection is the shell's
    arguments = shlex.split(line, comments=True)
    assert type(main.parse(arguments[1:])).__name__.lower() == arguments[1].replace("-", "")


@pytest.mark.parametrize(("page", "line"), sorted(set(SHELL) - set(JAXSPEC)))
def test_another_command_is_known_and_its_files_exist(page, line):
    arguments = shlex.split(line, comments=True)
    assert arguments[0] in SCRIPTS, line
    for name in re.findall(r"(?:scripts|tests|examples)/[\w./-]+", line):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [name for name, blocks in PYTHON.items() if blocks])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    if page == "docs/evaluation.md":  # draws the table and the picture anew, in the folder that it names
        (tmp_path / "results").unlink()
        (tmp_path / "results" / "voice").mkdir(parents=True)
        (tmp_path / "results/voice/evaluation.json").write_bytes((ROOT / "results/voice/evaluation.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(PYTHON[page]):
        exec(compile(block, f"{page} block {number}", "exec"), names)


@pytest.mark.parametrize("page", TEXT)
def test_links_and_files_that_are_named_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXT[page]):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:jaxspec|configs|scripts|tests|docs|results|examples)/[\w./]*)`", TEXT[page]):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in TEXT:
        assert not name.startswith("docs/") or name.removeprefix("docs/") in nav, name


def measured(preset, batch):
    """The rows of results/bench at K = 3, by rule."""
    rows = json.loads((ROOT / "results" / "bench" / preset / "bench.json").read_text())["rows"]
    return {row["rule"]: row for row in rows if row["batch"] == batch and row["draft_length"] == 3}


@pytest.mark.parametrize(
    ("preset", "batch", "label"),
    [("small", 1, "(`small`)"), ("batches", 16, "| the same |"), ("llasa-1b", 1, "(`llasa-1b`)"), ("builtin", 1, "(`builtin`)")],
)
def test_speeds_in_the_readme_are_those_that_were_measured(preset, batch, label):
    (line,) = [line for line in TEXT["README.md"].splitlines() if line.startswith("|") and label in line]
    rows = [measured(preset, batch)[rule] for rule in ("exact", "coarse-grained")]
    assert re.findall(r"\d\.\d\dx", line) == [f"{row['speed_up']:.2f}x" for row in rows]
    rates = {f"{row['tokens_per_round']:.2f}" for row in rows}
    assert set(re.findall(r"\d\.\d\d(?=[ ,])", line.split("|")[4])) == rates
