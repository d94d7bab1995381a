"""What the README shows runs as it stands, and what it names exists."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_code_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), {})


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:jaxspec|configs|scripts|tests|docs|results)/[\w./]*)`", README)
    named += re.findall(r"\]\(((?:docs|results)/[\w./-]+)\)", README)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_recipe_is_the_one_that_the_script_reads():
    recipe = tomllib.loads((ROOT / "configs" / "voice.toml").read_text(encoding="utf-8"))
    assert set(recipe) == {"corpus", "codec", "decoder", "target", "sample", "draft"}
