"""Every example runs, is short, and prints what its first lines claim."""

import pathlib
import re
import runpy

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def output(name, capsys, *args):
    """Runs ``main`` of an example, without implicit promotion of ranks and types; returns what it prints."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        runpy.run_path(str(EXAMPLES / name))["main"](*args)
    return capsys.readouterr().out


def percentages(text):
    return [int(number) for number in re.findall(r"(\d+)%", text)]


def test_a_model_in_plain_jax_is_decoded_as_by_the_plain_loop(capsys):
    printed = output("own_model_jax.py", capsys)
    assert "equal to the plain loop: True" in printed
    rates = [float(number) for number in re.findall(r"\d+\.\d*", printed)]
    assert len(rates) == 2
    assert max(rates) > 1.5  # greedy decoding of a model of two tokens repeats itself, which the n-gram draft finds


def test_a_model_in_nnx_that_drafts_for_itself_emits_whole_rounds(capsys):
    assert output("own_model_nnx.py", capsys) == "tokens per round: [4.]\n"


def test_a_verifier_accepts_more_as_its_bound_grows(capsys):
    exact, few, many = output("write_verifier.py", capsys).splitlines()
    assert percentages(few)[0] < percentages(many)[0]
    assert percentages(exact)[0] == percentages(exact)[1]  # whatever the exact rule accepts, the exact rule accepts


def test_a_drafter_that_knows_the_target_is_accepted_more_often(capsys):
    uniform, bigrams = percentages(output("write_drafter.py", capsys))
    assert bigrams > uniform + 10


def test_a_batch_is_spoken_into_files(capsys, tmp_path):
    printed = output("batch_synthesis.py", capsys, tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["001.wav", "002.wav", "003.wav"]
    assert "codes accepted" in printed


def test_a_loop_is_timed(capsys):
    lines = output("benchmark_loop.py", capsys, 1).splitlines()
    assert [line.split()[0] for line in lines] == ["autoregressive", "speculative"]
    assert "1.00x" in lines[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_offline(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    assert not re.search(r"\b(requests|urllib|huggingface_hub|torch)\b", source)
