"""CosyVoice 2 and 3 from a folder as it is published to sound, in the voice of a recording, against the reference packages."""

import json
import shutil

import commands
import cosyvoice_folders
import jax
import numpy as np
import pytest
import reference_flow
import reference_hift
import soundfile
import torch
from cosyvoice_folders import SPEAKERS, speech

from jaxspec.acoustic import cosyvoice, hift
from jaxspec.audio import fbank, mel
from jaxspec.audio.resample import resample
from jaxspec.checkpoint import descriptions, pretrained, voices
from jaxspec.codec import padding
from jaxspec.common.stopwatch import Stopwatch, compilations
from jaxspec.serve import warm_up
from jaxspec.serve.lane import Shapes
from jaxspec.synthesis.contract import Reference, Settings
from jaxspec.synthesis.load import load
from jaxspec.synthesis.pipeline import speak
from jaxspec.synthesis.stream import stream

own_cache = commands.own_cache
pytestmark = pytest.mark.usefixtures("own_cache")
TEXT, RATE = "The rain has stopped.", 24_000
# The phase of the vocoder's source sums the rounding of its pitch: 1e-6 in the spectrogram's values is 1.5e-4 in the wave's.
WAVE_ATOL = 5e-4
SETTINGS = {"max_codes": 12, "verify": "autoregressive"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cosyvoice")
    soundfile.write(root / "speaker.wav", np.stack([speech(2.0, RATE)] * 2, 1), RATE)  # stereo
    return root


@pytest.fixture(scope="module", params=(2, pytest.param(3, marks=pytest.mark.slow)))
def version(request):
    return request.param


@pytest.fixture(scope="module")
def folder(root, version):
    return cosyvoice_folders.converted(root, version)


@pytest.fixture(scope="module")
def folder_2(root):
    """That of CosyVoice 2, for what does not depend on the version."""
    return cosyvoice_folders.converted(root, 2)


@pytest.fixture(scope="module")
def synthesizer(folder):
    return load(folder)


@pytest.fixture(scope="module")
def reference(root, synthesizer):
    return Reference.from_wav(root / "speaker.wav", synthesizer, "Yes.")


def test_a_recording_becomes_what_the_references_make_of_it(root, version, reference):
    """Codes, spectrogram and speaker's embedding, cut to one length as the front-end of CosyVoice cuts them."""
    wave, _ = soundfile.read(root / "speaker.wav", dtype="float32")
    low = resample(wave.mean(1), RATE, 16_000)
    _, _, tokenizer, speaker = cosyvoice_folders.models(version)
    with torch.inference_mode():
        codes, count = tokenizer.quantize(torch.tensor(mel.whisper(low)).mT[None], torch.tensor([len(low) // 160]))
        bank = fbank.fbank(low)
        embedding = speaker(torch.tensor(bank - bank.mean(0, keepdims=True))[None]).numpy()
    spectrum = mel.prompt(wave.mean(1), 8000 if version == 2 else 12000)
    length = min(int(count[0]), len(spectrum) // 2)
    assert length == 50
    np.testing.assert_array_equal(reference.codes, codes[0, :length].numpy())
    condition = reference.condition
    assert condition["length"].tolist() == [length]
    np.testing.assert_array_equal(condition["codes"][0, :length], reference.codes)
    assert not condition["codes"][0, length:].any()
    np.testing.assert_allclose(condition["mel"][0, : 2 * length], spectrum[: 2 * length], atol=1e-5)
    np.testing.assert_allclose(condition["speaker"], embedding, atol=1e-4)


def test_codes_become_the_sound_that_the_references_make_of_them(folder, version, reference):
    """The flow on prompt and codes, then the vocoder on the part after the prompt, with the same noise."""
    codec = pretrained.load_codec(folder / "codec")
    flow, vocoder, *_ = cosyvoice_folders.models(version)
    codes = np.random.default_rng(0).integers(0, 6561, 20, np.int32)
    key = jax.random.split(jax.random.key(1), 1)
    arguments = np.array([20], np.int32), reference.condition, key
    (_, spectrogram), (_, sound) = codec.codec.stages
    spectrum = np.asarray(spectrogram(codec.params, codes[None, :, None], *arguments))
    prompt = reference.condition["mel"][0, : 2 * len(reference.codes)]
    both = np.concatenate([reference.codes, codes]).astype(np.int64)
    given = both, len(reference.codes), prompt, reference.condition["speaker"][0], False, True
    np.testing.assert_allclose(spectrum[0], reference_flow.mel(flow, *given), atol=2e-4)
    noise = np.asarray(hift.noise({2: hift.V2, 3: hift.V3}[version], key, np.zeros(1, np.int32), 40))[0]
    wave, *_ = reference_hift.outputs(vocoder, spectrum[0], noise)
    np.testing.assert_allclose(sound(codec.params, spectrum, *arguments)[0], wave, atol=WAVE_ATOL)
    whole = codec.codec.decode(codec.params, codes[None, :, None], *arguments)
    np.testing.assert_allclose(whole, sound(codec.params, spectrum, *arguments), atol=WAVE_ATOL)


def test_a_row_sounds_in_a_batch_as_alone(folder, synthesizer, reference):
    texts, settings = [TEXT, "Yes.", "The rain has stopped so we can go."], Settings(reference=reference, **SETTINGS)
    together = speak(texts, settings, synthesizer).utterances
    alone = [speak(texts, settings, synthesizer._replace(max_batch=1)).utterances[i] for i in range(3)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        assert len(one.wave) == 960 * len(one.codes)
        assert np.abs(one.wave).max() > 0.01
        np.testing.assert_allclose(one.wave, other.wave, atol=WAVE_ATOL)


def test_a_stream_is_the_sound_of_the_chunks_that_the_flow_sees(folder, version, synthesizer, reference):
    """Chunk by chunk what the whole row gives when the flow sees no later chunk; each as soon as nothing more can change it."""
    settings = Settings(reference=reference, max_codes=90, verify="autoregressive", seed=1)
    chunks = list(stream(TEXT, settings, synthesizer))
    codes = np.concatenate([chunk.codes for chunk in chunks])
    growing = pretrained.load_codec(folder / "codec").codec.growing
    settled = [growing.settled(count, reference.condition) for count in range(90)]
    after = {2: 11, 3: 3}[version]  # codes whose samples depend on mel after them
    # The prompt of 50 codes is two whole chunks: 25 codes more and 3 to look ahead to settle the third.
    assert settled[27] == 0
    assert settled[28] == settled[52] == 25 - after
    assert settled[53] == 50 - after
    assert [len(chunk.codes) for chunk in chunks][:2] == [25 - after, 25]
    assert len(codes) > 75
    codec = pretrained.load_codec(folder / "codec")
    (whole,) = padding.decode_rows(growing.codec, codec.params, [codes], reference.condition)
    np.testing.assert_allclose(np.concatenate([chunk.wave for chunk in chunks]), np.clip(whole, -1, 1), atol=5e-4)
    (full,) = padding.decode_rows(codec.codec, codec.params, [codes], reference.condition)
    assert np.abs(full - whole).max() > 1e-3  # it does see chunks
    (spoken,) = speak(TEXT, settings, synthesizer).utterances
    np.testing.assert_array_equal(spoken.codes, codes)
    np.testing.assert_allclose(spoken.wave, np.clip(full, -1, 1), atol=1e-4)


def test_the_warm_up_runs_voices_of_equal_sizes_once(folder_2, tmp_path):
    """Two named voices without a prompt, two whose prompts are padded to 80 codes, and one of 120: three sizes."""
    shutil.copytree(folder_2, tmp_path / "model")
    anna, rng = voices.read(voices.path_of(folder_2, "anna")), np.random.default_rng(0)
    for name, count in (("bob", 50), ("eve", 80), ("ian", 81)):
        codes, spectrum = rng.integers(0, 6561, count), rng.normal(size=(2 * count, 80)).astype(np.float32)
        condition = cosyvoice.condition(anna.condition["speaker"], codes, spectrum)
        voices.save(voices.path_of(tmp_path / "model", name), anna._replace(codes=codes.astype(np.int32), condition=condition))
    made, decoded = load(tmp_path / "model"), []
    assert made.voices == ("anna", "bob", "eve", "ian", "中文女")

    def decode(rows, settings, watch):
        decoded.append((settings.voice, len(rows[0])))
        return made.decode_growing(rows, settings, watch)

    sizes = Shapes(slots=1, prompt_widths=(64,), max_codes=41, num_stops=1)
    warm_up.codec(sizes, made._replace(decode_growing=decode), np.zeros(1, np.int32))
    assert sorted(decoded) == [(voice, length) for voice in ("eve", "ian", "中文女") for length in (40, 80)]
    before = compilations()
    for voice in made.voices:
        made.decode_growing([np.zeros(41, np.int32)], Settings(voice=voice), Stopwatch())
    assert compilations() == before


def test_it_speaks_with_named_voices_recordings_and_instructions(root, folder, version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say = ("say", TEXT, "--model", folder, "--max-codes", 12, "--json")

    def spoken(*how):
        code, printed, error = commands.run(*say, "--out", "a.wav", *how)
        assert code == 0, error
        return soundfile.read("a.wav"), json.loads(printed)

    assert voices.names(folder) == sorted(SPEAKERS)
    (named, rate), figures = spoken("--voice", "anna")
    assert rate == RATE
    assert len(named) == 960 * figures["tokens"]
    assert {"lm_seconds", "flow_seconds", "vocoder_seconds"} <= figures.keys()
    clip = ("--reference", root / "speaker.wav")
    (cloned, _), _ = spoken(*clip, "--reference-text", "Yes.")
    (crossed, _), _ = spoken(*clip)
    (instructed, _), _ = spoken(*clip, "--instruct", "Softly.")
    assert len({some.tobytes() for some in (named, cloned, crossed, instructed)}) == 4
    code, printed, error = commands.run("voice", "add", folder, "bob", *clip, "--reference-text", "Yes.")
    assert code == 0, error
    assert "50 codes" in printed
    np.testing.assert_array_equal(spoken("--voice", "bob")[0][0], cloned)
    _, printed, _ = commands.run("voice", "list", folder, "--json")
    assert json.loads(printed) == {"voices": ["anna", "bob", "中文女"]}
    refused = [
        (("voice", "add", folder, "bob", *clip), "expected a new name, got 'bob'"),
        (("voice", "add", folder, "../x", *clip), "expected the name of a voice"),
        (("voice", "add", folder, "eve"), "expected a name and --reference"),
        (
            (*say, "--out", "a.wav"),
            f"a voice for cosyvoice{version}, got none: give --reference speaker.wav, or --voice",
        ),
        ((*say, "--out", "a.wav", "--voice", "eve"), "expected a voice among anna, bob, 中文女, got 'eve'"),
    ]
    for arguments, message in refused:
        code, _, error = commands.run(*arguments)
        assert (code, message in error) == (2, True), error
    voices.path_of(folder, "bob").unlink()


BAD = {
    "silence.wav": (np.zeros(RATE), RATE, "louder than -60 dB"),
    "long.wav": (speech(31, 16_000), 16_000, "30 s or less"),
    "narrow.wav": (speech(2, 8_000), 8_000, "16000 Hz or more, got 8000"),
    "short.wav": (speech(0.05, RATE), RATE, "0.5 s or more, got 0.05 s"),
}


@pytest.mark.parametrize("name", [*BAD, "broken.mp3", "text.wav", "nowhere.wav"])
def test_a_recording_that_is_none_is_one_sentence(folder_2, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = "expected"
    if name in BAD:
        wave, rate, message = BAD[name]
        soundfile.write(name, wave, rate)
    elif name == "broken.mp3":
        soundfile.write(name, speech(2, RATE), RATE)
        (tmp_path / name).write_bytes(bytes(1000) + (tmp_path / name).read_bytes()[2000:2100])
    elif name == "text.wav":
        (tmp_path / name).write_text("no sound")
    code, _, error = commands.run("say", TEXT, "--model", folder_2, "--reference", name, "--out", "a.wav")
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "a.wav").exists()


def test_a_flow_that_is_not_stacked_is_refused(folder_2, tmp_path):
    params = pretrained.load_codec(folder_2 / "codec", encoder=False).params
    params["flow"]["estimator"]["middle_0"] = params["flow"]["estimator"].pop("middle")
    pretrained.save(tmp_path / "old", descriptions.read_as(folder_2 / "codec", descriptions.CodecDescription), params)
    with pytest.raises(ValueError, match=r"expected flow/estimator/middle/.* in .*old, got .* earlier version: convert it again"):
        pretrained.load_codec(tmp_path / "old", encoder=False)


def test_without_the_encoder_it_keeps_the_named_voices_and_refuses_recordings(root):
    folder = cosyvoice_folders.converted(root, 2, encoder=False)
    synthesizer = load(folder)
    assert len(speak(TEXT, Settings(voice="anna", **SETTINGS), synthesizer).utterances[0].wave)
    with pytest.raises(ValueError, match="expected the codec of cosyvoice2 with its encoder for a recording, got one that was"):
        Reference.from_wav(root / "speaker.wav", synthesizer)


def replace(name, content=None):
    def change(folder):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content(folder))

    return change


CHANGED = {
    "no vocoder": (replace("hift.pt"), "expected hift.pt beside flow.pt, got none"),
    "no tokenizer": (replace("speech_tokenizer_v2.onnx"), "expected speech_tokenizer_v2.onnx beside flow.pt"),
    "cut tokenizer": (
        replace("speech_tokenizer_v2.onnx", lambda folder: (folder / "campplus.onnx").read_bytes()[:-100]),
        "speech_tokenizer_v2.onnx",
    ),
    "another graph": (
        replace("speech_tokenizer_v2.onnx", lambda folder: (folder / "campplus.onnx").read_bytes()),
        "speech_tokenizer_v2.onnx: expected an S3 tokenizer v2 or v3",
    ),
    "cut flow": (replace("flow.pt", lambda folder: (folder / "hift.pt").read_bytes()[:-100]), "flow.pt"),
    "vocoder as flow": (replace("flow.pt", lambda folder: (folder / "hift.pt").read_bytes()), "flow.pt: expected"),
    "code in the voices": (replace("spk2info.pt", lambda folder: b"cos\nsystem\n(S'true'\ntR."), "spk2info.pt"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_damaged_folder_is_refused_and_nothing_is_written(root, folder_2, tmp_path, change):
    shutil.copytree(root / "CosyVoice2", tmp_path / "source")
    alter, message = CHANGED[change]
    alter(tmp_path / "source")
    code, _, error = commands.run("convert", tmp_path / "source", tmp_path / "dest")
    assert code == 2
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_flow_of_the_other_version_is_refused(root, folder, version, tmp_path):
    other = 5 - version
    if not (root / f"CosyVoice{other}").exists():
        cosyvoice_folders.make(root / f"CosyVoice{other}", other)
    shutil.copytree(root / f"CosyVoice{version}", tmp_path / "source")
    shutil.copy(root / f"CosyVoice{other}" / "flow.pt", tmp_path / "source")
    code, _, error = commands.run("convert", tmp_path / "source", tmp_path / "dest")
    assert code == 2
    assert f"expected flow.pt of cosyvoice{version}, as llm.pt is, got that of the other version" in error
