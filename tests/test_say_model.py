"""Speaking with converted checkpoints of every family, small and random, through the command line."""

import dataclasses
import json

import checkpoints
import commands
import folders
import numpy as np
import pytest
import soundfile
import torch

from jaxspec.checkpoint import pretrained
from jaxspec.models import card
from jaxspec.synthesis import converted
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak

TEXT = "The rain has stopped."
own_cache, folder = commands.own_cache, folders.folder
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def say(tmp_path, monkeypatch, folder):
    """Runs ``jaxspec say`` in a folder of its own, where a word that names a checkpoint stands for its path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        words = [folder(word) if word in folders.FOLDERS else word for word in map(str, arguments)]
        return commands.run("say", *words)

    return run


@pytest.fixture
def spoken(say):
    """Says something into a file, and gives its contents (codes, or a wave and its rate) and the figures."""

    def run(out, *arguments, text=TEXT):
        code, printed, err = say(text, "--out", out, "--json", "--max-codes", "20", *arguments)
        assert code == 0, err
        return np.load(out) if out.lower().endswith(".npy") else soundfile.read(out), json.loads(printed.splitlines()[-1])

    return run


PAIR = ("--model", "target", "--draft", "draft")


def test_llasa_speaks_with_a_draft_that_was_cut_from_it(spoken, tmp_path):
    (wave, rate), figures = spoken("a.wav", *PAIR, "--codec", "xcodec2", "--plot", "a.png")
    codes, again = spoken("a.npy", *PAIR)
    assert (rate, len(wave)) == (16_000, 320 * len(codes))
    assert figures["audio_seconds"] == pytest.approx(len(wave) / rate, abs=1e-3)
    assert np.abs(wave).max() > 0.01
    assert codes.dtype == np.int32
    assert 5 < len(codes) <= figures["tokens"] <= 20
    assert 0 <= codes.min() <= codes.max() < checkpoints.CODES
    assert figures["verify"] == "coarse-grained"
    assert 0 < figures["accepted"] < figures["drafted"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (again["tokens"], again["audio_seconds"], again["rtf"]) == (figures["tokens"], 0, None)
    assert figures["rtf"] > 0


def test_the_codec_in_the_models_folder_is_its_own(spoken, folder, tmp_path):
    (tmp_path / "model").mkdir()
    for path in folder("target").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    (tmp_path / "model" / "codec").symlink_to(folder("xcodec2"))
    (wave, _), _ = spoken("a.wav", "--model", "model")
    (given, _), _ = spoken("b.wav", "--model", "target", "--codec", "xcodec2")
    np.testing.assert_array_equal(wave, given)


def test_the_seed_decides(spoken):
    first, again, other = (spoken("a.npy", *PAIR, "--seed", seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_without_a_draft_it_is_autoregressive_and_greedy_drafts_change_nothing(spoken):
    plain, figures = spoken("a.npy", "--model", "target", "--temperature", "0")
    assert (figures["verify"], figures["drafted"], figures["tokens_per_round"]) == ("autoregressive", 0, 1)
    drafted, figures = spoken("b.npy", *PAIR, "--verify", "exact", "--temperature", "0")
    np.testing.assert_array_equal(drafted, plain)
    assert 0 < figures["accepted"] < figures["drafted"]


def test_the_wave_goes_on_after_the_reference_whose_own_part_is_cut_off(spoken, folder):
    prefix = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)
    np.save("prefix.npy", prefix)
    reference = ("--model", "target", "--reference", "prefix.npy", "--reference-text", "Yes, we can.")
    (wave, _), _ = spoken("a.wav", *reference, "--codec", "xcodec2")
    codes, _ = spoken("a.npy", *reference)
    assert codes.tolist() != spoken("b.npy", "--model", "target")[0].tolist()
    with torch.no_grad():
        both = torch.from_numpy(np.concatenate([prefix, codes])).long()
        whole = checkpoints.xcodec2_model("X-codec2").decode(both[None, None]).audio_values[0, 0].numpy()
    assert len(wave) == 320 * len(codes)
    np.testing.assert_allclose(wave, np.clip(whole[320 * len(prefix) :], -1, 1), atol=1e-4)


def test_pieces_of_a_long_text_are_joined_in_their_order(folder):
    synthesizer = converted.synthesizer(pretrained.load(folder("target")))
    text, settings = "The rain has stopped so we can go. " * 8, Settings(max_codes=20)
    together = speak([text], settings, synthesizer).utterances[0].codes
    alone = speak([text], settings, synthesizer._replace(max_batch=1)).utterances[0].codes
    np.testing.assert_array_equal(together, alone)
    first = speak(synthesizer.pieces(text)[:1], settings, synthesizer).utterances[0].codes
    np.testing.assert_array_equal(together[: len(first)], first)
    assert len(together) > len(first)


def test_orpheus_speaks_whole_frames(spoken):
    (wave, rate), figures = spoken("a.wav", "--model", "orpheus", "--codec", "snac", "--plot", "a.png", "--voice", "zoe")
    assert (rate, len(wave), figures["tokens"]) == (24_000, 2 * 96, 20)
    codes, _ = spoken("a.npy", "--model", "orpheus", "--voice", "zoe")
    assert codes.shape == (2, 7)
    assert 0 <= codes.min() <= codes.max() < 16


def test_frames_with_an_id_of_a_wrong_slot_are_dropped(folder):
    model = pretrained.load(folder("orpheus")).model
    frame = lambda *codes: [model.codes_first + 16 * slot + code for slot, code in enumerate(codes)]  # noqa: E731
    good, last = frame(0, 1, 2, 3, 4, 5, 6), frame(15, 15, 15, 15, 15, 15, 15)
    wrong = [*good[:3], good[3] + 16, *good[4:]]
    ids = np.array([1, *good, *wrong, 2, *last[:3], model.codes_first + 7 * 16, *last[3:], *model.stop_ids, *good[:6]], np.int32)
    codes, at = card.codes_of(model, ids)
    assert codes.tolist() == [[0, 1, 2, 3, 4, 5, 6], [15] * 7]
    assert at.tolist() == [list(range(1, 8)), [16, 17, 18, 20, 21, 22, 23]]
    codes, at = card.codes_of(model, ids[:4])
    assert codes.shape == at.shape == (0, 7)


@pytest.mark.parametrize("name", ["cosyvoice2", "cosyvoice3"])
def test_cosyvoice_without_its_flow_and_vocoder_writes_codes(spoken, say, tmp_path, name):
    np.save("prefix.npy", np.arange(6500, 6510))
    codes, _ = spoken("A.NPY", "--model", name, "--reference", "prefix.npy", "--reference-text", "Yes.")
    assert 5 < len(codes) <= 20
    assert 0 <= codes.min() <= codes.max() < 6561
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.NPY", "prefix.npy"]
    code, _, err = say(TEXT, "--model", name, "--out", "a.wav")
    assert code == 2
    assert "--out FILE.npy" in err
    (tmp_path / "texts.txt").write_text("Yes.\nNo.\n")
    code, _, err = say("--file", "texts.txt", "--model", name, "--out-dir", "out")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001.npy", "002.npy", "manifest.jsonl"]


def test_cosyvoice_says_2_to_20_codes_for_each_token_of_the_text(folder):
    """What holds it back is the first stop id alone, as in its own code."""
    target = pretrained.load(folder("cosyvoice2"))
    bias, count = target.params["head_bias"], len(card.tokenize(target.tokenizer, "Yes."))

    def said(bias):
        synthesizer = converted.synthesizer(target._replace(params=target.params | {"head_bias": bias}))
        return len(speak(["Yes."], synthesizer=synthesizer).utterances[0].codes)

    never = bias.at[6561:].set(-1e3)
    assert said(never) == 20 * count
    assert said(never.at[6561].set(1e3)) == 2 * count
    assert said(never.at[6562].set(1e3)) == 0
    assert len(speak(["Yes."], Settings(max_codes=5), converted.synthesizer(target)).utterances[0].codes) == 5


def test_llasa_says_no_more_than_its_context_holds(folder):
    target = pretrained.load(folder("target"))
    requests = converted.synthesizer(target).requests([TEXT, TEXT + TEXT], Settings())
    np.testing.assert_array_equal(requests.limit + requests.prompt_length, 2048)
    assert requests.limit.max() <= requests.max_new_tokens
    room = dataclasses.replace(target.model, max_tokens=int(requests.prompt_length[0]) + 7)
    utterance = speak([TEXT], synthesizer=converted.synthesizer(target._replace(model=room))).utterances[0]
    assert len(utterance.codes) == 7


def test_neutts_speaks_phonemes(spoken, folder):
    (wave, rate), figures = spoken("a.wav", "--model", "neutts-air", "--codec", "neucodec")
    codes, _ = spoken("a.npy", "--model", "neutts-air")
    assert (rate, len(wave), figures["tokens"]) == (24_000, 480 * len(codes), 20)  # no stop id before 50
    assert 0 < len(codes) < 20  # what is no code is left out
    assert 0 <= codes.min() <= codes.max() < checkpoints.CODES
    requests = converted.synthesizer(pretrained.load(folder("neutts-air"))).requests([TEXT], Settings())
    assert (requests.sampling[0].min_new_tokens, int(requests.limit[0] + requests.prompt_length[0])) == (50, 2048)


REFUSED = [
    (["--model", "target", "--verify", "exact"], "expected a draft for exact, got none: give --draft"),
    (["--draft", "draft"], "builtin.safetensors, whose num_codes is 4375, got"),
    (["--codec", "xcodec2"], "expected --model with --codec"),
    (["--model", "target", "--draft", "orpheus"], "whose codes_first is 315"),
    (["--model", "llasa", "--draft", "draft"], "whose codes_first is 313, got"),
    (["--model", "target", "--draft", "padded"], "whose text_first is 97, got"),
    (["--model", "target", "--draft", "altered"], "whose token 5 is 'other'"),
    (["--model", "orpheus", "--voice", "nobody"], "tara, leah, jess, leo, dan, mia, zac, zoe, got 'nobody'"),
    (["--model", "target", "--voice", "slt"], "'slt'"),
    (["--model", "target", "--codec", "snac"], "expected the codec xcodec2 for llasa, got snac"),
    (["--model", "neutts-air", "--codec", "xcodec2"], "expected the codec neucodec for neutts-air, got xcodec2"),
    (["--model", "cosyvoice2", "--codec", "xcodec2"], "for cosyvoice2, got xcodec2"),
    (["--model", "xcodec2"], "expected a language model in"),
    (["--model", "target", "--codec", "draft"], "expected a codec in"),
    (["--model", "nowhere"], "expected a folder that `jaxspec convert` made at nowhere"),
    (["--model", "target", "--reference", "nowhere.npy"], "nowhere.npy"),
    (["--model", "target", "--reference", "matrix.npy"], "reference codes int [T] of 0 to 95, got (2, 3)"),
    (["--model", "target", "--reference", "floats.npy"], "got float64 (3,)"),
    (["--model", "target", "--reference", "none.npy"], "got int64 (0,)"),
    (["--model", "target", "--reference", "zip.npy"], "expected a .npy file of reference codes, got zip.npy"),
    (["--model", "target", "--reference", "text.npy"], "expected a .npy file of reference codes, got text.npy"),
    (["--model", "target", "--reference", "empty.npy"], "expected a .npy file of reference codes, got empty.npy"),
    (["--model", "target", "--reference", "beyond.npy"], "of 0 to 95, got (3,) of 1 to 96"),
    (["--model", "orpheus", "--reference", "good.npy"], "reference codes int [T 7] of 0 to 15, got (3,)"),
    (["--model", "target", "--instruct", "Softly."], "no instruction for llasa"),
    (["--reference", "good.npy"], "no reference or instruction for the built-in voice"),
    (["--instruct", "Softly."], "no reference or instruction for the built-in voice"),
    (["--model", "target", "--reference-text", "Yes."], "got the text only: give both"),
    (["--model", "target", "--reference", "long.npy"], "expected prompts of less than 2048 tokens, got 2"),
    (["--model", "target", "--plot", "a.png"], "expected a codec for --plot"),
    (["--model", "target", "--out", "a.wav"], "expected a codec to make sound for a.wav"),
    (["--model", "target", "--max-codes", "0"], "max_codes of 1 or more"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input_is_one_clear_sentence_and_leaves_the_old_file(say, folder, tmp_path, arguments, message):
    row = np.array([1, 2, 3])
    np.save("good.npy", row)
    np.save("matrix.npy", np.stack([row, row]))
    np.save("floats.npy", row / 2)
    np.save("none.npy", row[:0])
    np.save("beyond.npy", np.array([1, 2, 96]))
    np.save("long.npy", np.zeros(2048, int))
    with open("zip.npy", "wb") as file:
        np.savez(file, codes=row)
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "a.npy").write_bytes(b"old")
    if "altered" in arguments:
        (tmp_path / "altered").mkdir()
        for path in folder("draft").iterdir():
            (tmp_path / "altered" / path.name).symlink_to(path)
        tokenizer = (tmp_path / "altered" / card.TOKENIZER).read_text()
        (tmp_path / "altered" / card.TOKENIZER).unlink()
        (tmp_path / "altered" / card.TOKENIZER).write_text(tokenizer.replace('"&": 5', '"other": 5'))
    before = sorted(tmp_path.iterdir())
    code, _, err = say(TEXT, *(() if "--out" in arguments else ("--out", "a.npy")), *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert (tmp_path / "a.npy").read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", ["", "?!"])
def test_a_text_without_a_word_is_refused(say, text):
    code, _, err = say(text, "--out", "a.npy", "--model", "target")
    assert code == 2
    assert "expected a text" in err


def test_json_is_all_that_convert_prints_on_standard_output(tmp_path):
    (tmp_path / "source").mkdir()
    checkpoints.MAKERS["llasa"](tmp_path / "source")
    code, printed, err = commands.run("convert", tmp_path / "source", tmp_path / "made", "--json")
    assert code == 0, err
    assert (json.loads(printed)["family"], json.loads(printed)["folder"]) == ("llasa", str(tmp_path / "made"))
    assert "llasa: " in err
