"""The README is short, its code runs, and every file that it names exists. Its commands are parsed in test_docs."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MOST_WORDS, MOST_LINES = 800, 12


def words(markdown):
    """The words that a reader sees: code blocks and the targets of links are left out; text of tables, links and pictures counts.

    A word is what stands between blanks and holds a letter or a digit.
    """
    prose = re.sub(r"```.*?```", " ", markdown, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "] ", prose)
    return [word for word in prose.split() if re.search(r"\w", word)]


def test_words_are_counted():
    assert words("# One two\n\n```sh\nnot this\n```\n| three | [four](five.md) |\n|---|---|\n") == [
        "One",
        "two",
        "three",
        "[four]",
    ]


def test_it_is_short():
    assert len(words(README)) <= MOST_WORDS
    assert [len([line for line in block.splitlines() if line]) <= MOST_LINES for block in BLOCKS] == [True]


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_code_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), {})


def test_every_file_that_is_named_exists():
    named = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_recipe_is_the_one_that_the_script_reads():
    recipe = tomllib.loads((ROOT / "configs" / "voice.toml").read_text(encoding="utf-8"))
    assert set(recipe) == {"corpus", "codec", "decoder", "target", "draft"}
