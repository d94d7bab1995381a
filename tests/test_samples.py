"""Samples: shards, checks, packing, and the command `sample`."""

import json

import numpy as np
import pytest
from commands import own_cache, run
from folders import folder

from jaxspec.models.builtin import STOP, VOCAB
from jaxspec.text.symbols import SYMBOLS
from jaxspec.train import packing, speech
from jaxspec.train import samples as samples_lib

__all__ = ["folder", "own_cache"]
pytestmark = pytest.mark.usefixtures("own_cache")
LINES = ["Hello there, the rain.", "Go on.", "We can stop.", "The system.", "Twelve users.", "No."]


def some(count, seed=0, vocab=50):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(vocab, size=n) for n in rng.integers(5, 40, count)]
    return samples_lib.of_rows(rows, rng.integers(1, 5, count), [f"text {i}" for i in range(count)])


def equal(a, b):
    return a.texts == b.texts and all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_shards_are_read_as_written(tmp_path):
    samples_lib.write_shard(samples_lib.shard_path(tmp_path, 1), some(3, 1))
    samples_lib.write_shard(samples_lib.shard_path(tmp_path, 0), some(2, 0))
    assert equal(samples_lib.read(tmp_path), samples_lib.concatenate([some(2, 0), some(3, 1)]))
    assert {path.name for path in tmp_path.iterdir()} == {"00000.npz", "00001.npz"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": np.array([0, 3, 9])}, "expected start"),
        ({"texts": ["a", "b", "c"]}, "expected start"),
        ({"prompt_length": np.array([2, 5], np.int32)}, "a token after each prompt"),
        ({"tokens": np.zeros(8)}, "float64"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, change, message):
    whole = samples_lib.of_rows([np.arange(3), np.arange(5)], [1, 2], ["a", "b"])
    samples_lib.write_shard(tmp_path / "00000.npz", whole._replace(**change))
    with pytest.raises(ValueError, match=message):
        samples_lib.read(tmp_path)


def test_a_file_that_is_no_shard_is_refused(tmp_path):
    (tmp_path / "00000.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="expected a shard"):
        samples_lib.read(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder with \.npz shards"):
        samples_lib.read(tmp_path / "none")


def test_held_out_are_the_last_rows():
    for count, held in ((16, 8), (400, 20)):
        shown, last = samples_lib.split(some(count))
        assert (len(shown.texts), len(last.texts)) == (count - held, held)
        assert equal(samples_lib.concatenate([shown, last]), some(count))
    with pytest.raises(ValueError, match="at least 16 samples, got 15"):
        samples_lib.split(some(15))


def contents(batch):
    """The samples of a batch, as tuples of tokens and which of them were emitted."""
    for tokens, segment, emitted in zip(*batch[:3], strict=True):
        for number in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == number)
            assert (np.diff(at) == 1).all()
            yield tuple(tokens[at]), tuple(emitted[at])


def expected(samples):
    lengths = np.diff(samples.start)
    flags = [np.arange(n) >= p for n, p in zip(lengths, samples.prompt_length, strict=True)]
    return sorted((tuple(samples.row(i)), tuple(flags[i])) for i in range(len(lengths)))


def test_an_epoch_has_every_sample_once_in_another_order():
    samples = some(60)
    rows = [len(packing.first_fit(np.diff(samples.start)[np.random.default_rng((3, e)).permutation(60)], 64)) for e in (0, 1)]
    source = packing.batches(samples, 1, 64, seed=3)
    epochs = [[next(source) for _ in range(count)] for count in rows]
    first, second = ([one for batch in epoch for one in contents(batch)] for epoch in epochs)
    assert sorted(first) == sorted(second) == expected(samples)
    assert first != second
    used = np.mean([(batch.segment > 0).mean() for batch in epochs[0]])
    assert used > 0.85


def test_batches_go_on_from_any_step():
    samples = some(30)
    source = packing.batches(samples, 4, 64, seed=1)
    whole = [next(source) for _ in range(9)]
    for step in (0, 1, 5, 8):
        for a, b in zip(next(packing.batches(samples, 4, 64, 1, step)), whole[step], strict=True):
            np.testing.assert_array_equal(a, b)


def test_held_out_batches_hold_every_sample_in_order():
    samples = some(30)
    found = [one for batch in packing.held_out(samples, 4, 64) for one in contents(batch)]
    assert sorted(found) == expected(samples)


def test_a_sample_longer_than_a_row_is_cut():
    samples = samples_lib.of_rows([np.arange(20)], [3], ["a"])
    batch = next(packing.batches(samples, 1, 8, 0))
    assert batch.tokens.tolist() == [list(range(8))]
    assert batch.emitted.tolist() == [[False] * 3 + [True] * 5]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def sample(target, texts, out, *more):
    return run("sample", target, "--texts", texts, "--out", out, "--max-codes", "60", "--batch", "4", *more)


def test_a_model_is_sampled_and_only_finished_rows_are_kept(folder, texts, tmp_path):
    out = tmp_path / "samples"
    code, printed, err = sample(folder("target"), texts, out, "--temperature", "1", "--json")
    assert code == 0, err
    target = speech.load_target(str(folder("target")))
    samples = speech.read(out, target)
    figures = json.loads(printed)
    assert figures == {"folder": str(out), "pieces": 6, "finished": len(samples.texts), "tokens": len(samples.tokens)}
    assert 0 < figures["finished"] <= 6
    stops = target.pretrained.model.stop_ids
    for i, text in enumerate(samples.texts):
        assert text in LINES
        emitted = samples.row(i)[samples.prompt_length[i] :]
        assert emitted[-1] in stops
        assert not set(emitted[:-1]) & set(stops)
    asked = target.synthesizer.requests(samples.texts[:1], speech.Settings())
    assert samples.row(0)[: samples.prompt_length[0]].tolist() == asked.prompt[0, : asked.prompt_length[0]].tolist()
    assert json.loads((out / "samples.json").read_text())["target"] == target.pretrained.model.digest

    kept = (out / "00000.npz").read_bytes()
    whole = samples_lib.read_shard(out / "00001.npz")
    (out / "00001.npz").unlink()
    assert sample(folder("target"), texts, out, "--temperature", "1")[0] == 0
    assert (out / "00000.npz").read_bytes() == kept
    assert equal(samples_lib.read_shard(out / "00001.npz"), whole)
    assert equal(speech.read(out, target), samples)

    for changed, name in ((["--temperature", "0.9"], "sampling"), (["--temperature", "1", "--seed", "1"], "seed")):
        code, _, err = sample(folder("target"), texts, out, *changed)
        assert (code, err.count("\n")) == (2, 1)
        assert f"expected samples with the {name}" in err
    code, _, err = sample(folder("draft"), texts, out, "--temperature", "1")
    assert code == 2
    assert "expected samples with the target blake3:" in err


def test_codes_with_texts_get_prompts_and_a_stop(tmp_path):
    codes = [np.array([5, 6, 7]), np.array([8, 9])]
    samples_lib.write_shard(tmp_path / "00000.npz", samples_lib.of_rows(codes, None, ["hello.", "good day."]))
    target = speech.load_target("builtin")
    samples = speech.read(tmp_path, target)
    for i, row in enumerate(codes):
        assert samples.row(i)[samples.prompt_length[i] :].tolist() == [*row, STOP]
        assert samples.row(i)[: samples.prompt_length[i]].min() >= VOCAB


@pytest.mark.parametrize(
    ("row", "prompt", "message"),
    [
        ([3, STOP], None, "expected codes from 0"),
        ([VOCAB, VOCAB], [1], "expected emitted tokens"),
        ([-1, 3], [1], "prompt tokens"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, row, prompt, message):
    samples_lib.write_shard(tmp_path / "00000.npz", samples_lib.of_rows([np.array(row)], prompt, ["a"]))
    with pytest.raises(ValueError, match=message):
        speech.read(tmp_path, speech.load_target("builtin"))


def test_samples_of_another_target_are_refused(tmp_path):
    samples_lib.claim(tmp_path, {"target": "blake3:other"})
    with pytest.raises(ValueError, match="got those of blake3:other"):
        speech.read(tmp_path, speech.load_target("builtin"))
    (tmp_path / "samples.json").write_text("[")
    with pytest.raises(ValueError, match="expected a description of samples"):
        speech.read(tmp_path, speech.load_target("builtin"))


def test_shards_that_are_not_of_this_command_are_not_mixed_with_its_own(tmp_path):
    samples_lib.write_shard(tmp_path / "00000.npz", some(2))
    with pytest.raises(ValueError, match="other shards"):
        samples_lib.claim(tmp_path, {"target": "x"})


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "expected a text on each line"),
        ("Fine.\n...\n", [], "line 2"),
        ("Fine.", ["--batch", "0"], "expected a batch"),
        ("Fine.", ["--voice", "nobody"], "expected a voice among"),
        ("Fine.", ["--max-codes", "1"], "expected speech that ends"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, content, arguments, message):
    path = tmp_path / "texts.txt"
    path.write_text(content)
    code, printed, err = run("sample", "builtin", "--texts", path, "--out", tmp_path / "out", *arguments)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list((tmp_path / "out").glob("*.npz")) or message == "expected speech that ends"


def test_the_voices_take_the_batches_in_turn(tmp_path):
    target = speech.load_target("builtin")
    what = speech.Speech(("hello.",) * 3, speech.Settings(max_codes=40), target.voices, 2)
    assert speech.sample(tmp_path, what, target).pieces == 3
    for index, path in enumerate(sorted(tmp_path.glob("*.npz"))):
        shard = samples_lib.read_shard(path)
        assert {int(shard.row(i)[0]) - VOCAB - len(SYMBOLS) for i in range(len(shard.texts))} == {index}
