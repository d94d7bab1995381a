"""Voices of recordings and recordings to codes, by the commands voice, encode and say, for the codecs that decode their codes."""

import json

import commands
import cosyvoice_folders
import folders
import numpy as np
import pytest
import soundfile

from jaxspec.audio.resample import resample
from jaxspec.checkpoint import pretrained, voices
from jaxspec.models.builtin import VOICES
from jaxspec.models.builtin import load as builtin_voice
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Reference, Settings
from jaxspec.synthesis.load import load
from jaxspec.synthesis.pipeline import speak
from jaxspec.train import samples

own_cache, folder = commands.own_cache, folders.folder
pytestmark = pytest.mark.usefixtures("own_cache")
RATE, TEXT = 22_050, "The rain has stopped."
SAYS = ("--reference-text", "Yes.")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a recording."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("speaker.flac", cosyvoice_folders.speech(1.3, RATE), RATE)
    return tmp_path


def with_codec(place, folder, model, codec):
    """A model whose folder has a codec, and is this test's own."""
    (place / "model").mkdir()
    for path in folder(model).iterdir():
        (place / "model" / path.name).symlink_to(path)
    (place / "model" / "codec").symlink_to(folder(codec))
    return place / "model"


def run(*arguments):
    code, printed, error = commands.run(*arguments)
    assert code == 0, error
    return printed


def test_a_voice_that_was_added_speaks_as_its_recording(place, folder):
    made = with_codec(place, folder, "orpheus", "snac")
    run("voice", "add", made, "anna", "--reference", "speaker.flac", *SAYS)
    say = ("say", TEXT, "--model", made, "--max-codes", "20", "--out")
    run(*say, "voice.npy", "--voice", "anna")
    run(*say, "wav.npy", "--reference", "speaker.flac", *SAYS)
    run("encode", made / "codec", "speaker.flac", "--out", "codes")
    run(*say, "codes.npy", "--reference", "codes/speaker.npy", *SAYS)
    run(*say, "none.npy")
    spoken = {name: np.load(f"{name}.npy").tolist() for name in ("voice", "wav", "codes", "none")}
    assert spoken["voice"] == spoken["wav"] == spoken["codes"] != spoken["none"]
    assert "anna" in run("voice", "list", made)
    run(*say, "voice.wav", "--voice", "anna")
    assert soundfile.info("voice.wav").frames > 0


@pytest.mark.parametrize(("model", "codec"), [("target", "xcodec2"), ("neutts-air", "neucodec")])
def test_a_reference_of_a_family_with_one_code_a_frame_has_the_codes_of_its_codec(place, folder, model, codec):
    """The codecs have all 65,536 codes, of which the small models know the first: so the codes are looked at, not spoken."""
    synthesizer = load(with_codec(place, folder, model, codec))
    reference = Reference.from_wav("speaker.flac", synthesizer, "Yes.")
    run("encode", folder(codec), "speaker.flac", "--out", "codes")
    np.testing.assert_array_equal(reference.codes, np.load("codes/speaker.npy"))
    assert (reference.text, reference.condition) == ("Yes.", None)
    assert len(reference.codes) in (65, 66)  # 1.3 s


def test_codes_of_a_recording_are_those_of_the_codec(place, folder):
    codec = pretrained.load_codec(folder("snac"))
    wave, rate = soundfile.read("speaker.flac", dtype="float32")
    high = resample(wave, rate, 24_000)
    codes = np.asarray(codec.codec.encode(codec.params, high[None], np.array([len(high)], np.int32)))[0]
    run("encode", folder("snac"), "speaker.flac", "--out", "codes")
    np.testing.assert_array_equal(np.load("codes/speaker.npy"), codes)


def test_a_voice_of_another_codec_is_refused(place, folder):
    made = with_codec(place, folder, "orpheus", "snac")
    path = voices.path_of(made, "eve")
    voices.save(path, voices.Voice("Yes.", np.zeros((2, 7), np.int32), None, "blake3:other"))
    code, _, error = commands.run("say", TEXT, "--model", made, "--voice", "eve", "--out", "a.wav")
    assert code == 2
    assert "got one of blake3:other: add it again" in error
    for content in (b"", path.read_bytes()[:-5], b"\x80\x04N."):
        path.write_bytes(content)
        code, _, error = commands.run("say", TEXT, "--model", made, "--voice", "eve", "--out", "b.wav")
        assert code == 2
        assert "expected a voice file, got" in error
    assert not (place / "a.wav").exists()


def test_a_voice_file_keeps_a_nested_condition(tmp_path):
    condition = {"speaker": np.ones((1, 3), np.float32), "prompt": {"mel": np.zeros((1, 2, 80), np.float32)}}
    kept = voices.Voice("Où? 是", np.array([1, 2], np.int32), condition, "blake3:0")
    voices.save(tmp_path / "voices" / "a.safetensors", kept)
    read = voices.read(tmp_path / "voices" / "a.safetensors")
    assert (read.text, read.codes.tolist(), read.encoder) == ("Où? 是", [1, 2], "blake3:0")
    np.testing.assert_array_equal(read.condition["prompt"]["mel"], condition["prompt"]["mel"])


def test_a_reference_from_python_is_that_of_the_command(place, folder):
    synthesizer = load(with_codec(place, folder, "orpheus", "snac"))
    reference = Reference.from_wav("speaker.flac", synthesizer, "Yes.")
    utterance = speak(TEXT, Settings(reference=reference, max_codes=20), synthesizer).utterances[0]
    run("say", TEXT, "--model", "model", "--reference", "speaker.flac", *SAYS, "--max-codes", "20", "--out", "a.npy")
    np.testing.assert_array_equal(np.load("a.npy"), utterance.codes)


def test_recordings_are_encoded_into_data_for_drafts_and_again_from_where_it_stopped(place, folder):
    (place / "more").mkdir()
    for i in range(3):
        soundfile.write(f"more/r{i}.wav", cosyvoice_folders.speech(0.3 + 0.2 * i, 16_000, i), 16_000)
    (place / "texts.csv").write_text("speaker|Raw.|Yes.\nr0|One.\nr1.wav\tTwo.\nr2|Three.\n")
    arguments = ("encode", folder("xcodec2"), "speaker.flac", "more", "--out", "codes", "--texts", "texts.csv", "--json")
    assert json.loads(run(*arguments)) == {"folder": "codes", "recordings": 4, "failed": {}}
    first = {path.name: path.read_bytes() for path in (place / "codes").iterdir()}
    assert sorted(first) == ["00000.npz", "codec.json", "r0.npy", "r1.npy", "r2.npy", "speaker.npy"]
    data = samples.read(place / "codes")
    assert data.texts == ["Yes.", "One.", "Two.", "Three."]
    np.testing.assert_array_equal(data.row(2), np.load("codes/r1.npy"))
    assert [len(np.load(f"codes/r{i}.npy")) for i in range(3)] == [16, 26, 36]
    (place / "codes" / "r1.npy").unlink()
    kept = (place / "codes" / "r2.npy").stat().st_mtime_ns
    run(*arguments, "--batch", "1")
    np.testing.assert_array_equal(np.load("codes/r1.npy"), data.row(2))
    assert (place / "codes" / "r2.npy").stat().st_mtime_ns == kept
    code, _, error = commands.run("encode", folder("neucodec"), "more", "--out", "codes")
    assert code == 2
    assert "use the codec that the folder was begun with" in error


def test_a_bad_recording_is_named_and_the_others_are_encoded(place, folder):
    (place / "bad.wav").write_bytes(b"RIFF")
    soundfile.write("long.wav", np.zeros(61 * 8000, np.float32), 8000)
    code, _, error = commands.run("encode", folder("snac"), "bad.wav", "long.wav", "speaker.flac", "--out", "codes")
    assert code == 2
    assert "got 2 of 3 that are none" in error
    assert "bad: expected a wav, flac, mp3 or ogg file" in error
    assert "long: expected at most 60 s, got 61 s" in error
    assert (place / "codes" / "speaker.npy").exists()


REFUSED = {
    "no encoder": (("encode", "bare", "speaker.flac", "--out", "codes"), "expected a codec with its encoder"),
    "not a codec": (("encode", "orpheus", "speaker.flac", "--out", "codes"), "expected a codec in"),
    "no file": (("encode", "snac", "nowhere.wav", "--out", "codes"), "expected sound files"),
    "empty folder": (("encode", "snac", ".", "--out", "codes", "--texts", "texts.csv"), "got none for speaker: add it"),
    "a line without text": (("encode", "snac", "speaker.flac", "--out", "codes", "--texts", "bad.csv"), "on line 1 of bad.csv"),
    "batch": (("encode", "snac", "speaker.flac", "--out", "codes", "--batch", "0"), "a batch of 1 or more, got 0"),
    "two of one name": (("encode", "snac", "speaker.flac", "speaker.wav", "--out", "codes"), "one recording for each name"),
    "no text": (("say", TEXT, "--model", "target", "--codec", "xcodec2", "--reference", "speaker.flac"), "give --reference-text"),
    "no codec": (("say", TEXT, "--model", "target", "--reference", "speaker.flac", "--out", "b.npy"), "got no codec"),
    "bare codec": (
        ("say", TEXT, "--model", "orpheus", "--codec", "bare", "--reference", "speaker.flac", *SAYS),
        "got one that was converted without it",
    ),
    "built-in": (("say", TEXT, "--reference", "speaker.flac"), "no reference or instruction for the built-in voice"),
    "built-in voice add": (("voice", "add", "snac", "a", "--reference", "speaker.flac"), "expected a language model in"),
    "list with a name": (("voice", "list", "orpheus", "tara"), "expected nothing but a model"),
    "named already": (("voice", "add", "orpheus", "tara", "--reference", "speaker.flac"), "expected a new name, got 'tara'"),
    "voice without codec": (("voice", "add", "orpheus", "a", "--reference", "speaker.flac"), "got none in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(place, folder, case):
    soundfile.write("speaker.wav", cosyvoice_folders.speech(1, RATE), RATE)
    (place / "texts.csv").write_text("other|Yes.\n")
    (place / "bad.csv").write_text("speaker\n")
    arguments, message = REFUSED[case]
    if "two of one" not in case:
        (place / "speaker.wav").unlink()
    words = [folder(word) if word in folders.FOLDERS else word for word in arguments]
    out = ("--out", "a.wav") if words[0] == "say" and "--out" not in words else ()
    code, _, error = commands.run(*words, *out)
    assert (code, message in error) == (2, True), error
    assert len(error.strip().splitlines()) == 1
    assert not list(place.glob("a.wav")) + list(place.glob("codes/*.np*"))


def test_the_built_in_codec_encodes_what_it_decodes_to_codes_near_by():
    """Its encoder gives, of speech that it decoded, mostly the codes that were decoded."""
    utterance = speak("Hello there, this is a test.", Settings(voice=VOICES[0]), builtin()).utterances[0]
    voice = builtin_voice()
    from jaxspec.codec.builtin import codec

    wave = np.zeros((1, 40 * -(-len(utterance.codes) // 40) * 640), np.float32)
    wave[0, : len(utterance.wave)] = utterance.wave
    codes = codec(voice.codec).encode(voice.codec_params, wave, np.array([len(utterance.wave)], np.int32))
    vectors = voice.code_vectors("codec")
    again = np.asarray(codes)[0, : len(utterance.codes), 0]
    distance = np.linalg.norm(vectors[again] - vectors[utterance.codes], axis=1)
    chance = np.linalg.norm(vectors[np.roll(again, 7)] - vectors[utterance.codes], axis=1)
    assert distance.mean() < 0.5 * chance.mean()
