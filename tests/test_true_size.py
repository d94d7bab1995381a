"""LLaSA-1B with X-codec2, and CosyVoice 2 and 3, at their true sizes with random weights: memory and time from files to a wave.

Run by hand; it takes minutes, 16 GB of disk and 16 GB of memory: pytest -m slow -s -n 0 tests/test_true_size.py
"""

import json
import math
import statistics
import subprocess
import sys

import checkpoints
import cosyvoice_folders
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch
import transformers

pytestmark = pytest.mark.slow

LLASA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 193_800,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_parameters": checkpoints.LLAMA3 | {"original_max_position_embeddings": 8192},
}
CONVERT = """
import json, os, pathlib, re, shutil, sys, time
from jaxspec.convert.pipeline import Options, convert
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
def copy(source, dest):  # to the disk, like a conversion
    dest.mkdir()
    for path in source.iterdir():
        with path.open("rb") as old, (dest / path.name).open("wb") as new:
            shutil.copyfileobj(old, new, 2**16)  # the fastest of the sizes and calls that were tried
            os.fsync(new.fileno())
def timed(make, *arguments):  # with no pages or writes of the previous run pending
    for folder in (dest, other):
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    made = make(*arguments)
    return time.perf_counter() - start, made
source, dest, other, layers, head = sys.argv[1:]
options = Options(layers=tuple(map(int, layers.split(","))) if layers else None, head=head)
before, seconds, copy_seconds = peak(), [], []
for repeat in range(5 if other else 1):  # interleaved, as the speed of a disk varies
    if other:
        copy_seconds.append(timed(copy, pathlib.Path(source), pathlib.Path(other))[0])
    took, made = timed(convert, source, dest, options)
    seconds.append(took)
print(json.dumps({"bytes": made.bytes, "seconds": seconds, "copy_seconds": copy_seconds, "peak": peak(), "before": before}))
"""
SAY = """
import json, pathlib, re, sys
from jaxspec.commands import main as cli
sys.argv = ["jaxspec", *sys.argv[1:]]
cli.main()
kib = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
print(json.dumps({"peak": int(kib) * 1024}))
"""
ENCODE = """
import json, pathlib, re, sys, time
import numpy as np
from jaxspec.checkpoint.pretrained import load_codec
from jaxspec.codec.padding import encode_rows
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
start = time.perf_counter()
made = load_codec(sys.argv[1])
seconds, loaded = [time.perf_counter() - start], peak()
wave, processor = 0.1 * np.random.default_rng(0).normal(size=64_000).astype(np.float32), []
for _ in range(3):
    start = time.perf_counter(), time.process_time()
    (codes,) = encode_rows(made.codec, made.params, [wave])
    seconds.append(time.perf_counter() - start[0])
    processor.append(time.process_time() - start[1])
print(json.dumps({"codes": codes.shape, "seconds": seconds, "processor": processor, "peaks": [loaded, peak()]}))
"""


def random_weights(path, shapes, dtype):
    """A safetensors file of normal numbers, the norms near one; large tensors repeat a million of them from different places."""
    generator = np.random.default_rng(0)
    pool = generator.standard_normal(2**20, np.float32)

    def numbers(name, shape):
        size = math.prod(shape)
        values = np.resize(np.roll(pool, generator.integers(len(pool))), size).reshape(shape)
        scale = 0.02 if len(shape) > 1 else 0.1
        return (values * scale + float("norm" in name)).astype(dtype)

    safetensors.numpy.save_file({name: numbers(name, shape) for name, shape in shapes.items()}, path)


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def speak_in_a_recordings_voice(model, folder, codes):
    """4 s of speech are ``codes``; prints the seconds of each stage."""
    soundfile.write(folder / "speaker.wav", cosyvoice_folders.speech(3.0, 24_000), 24_000)
    clip = ["--reference", folder / "speaker.wav", "--reference-text", "The rain has stopped."]
    arguments = ["say", "The rain has stopped and the sun is out.", "--model", model, *clip, "--json", "--out", folder / "a.wav"]
    spoken, memory = run(SAY, *arguments, "--max-codes", codes)
    wave, rate = soundfile.read(folder / "a.wav")
    assert spoken["tokens"] == codes
    assert len(wave) == 4 * rate
    assert np.isfinite(wave).all()
    seconds = {name.removesuffix("_seconds"): round(value, 2) for name, value in spoken.items() if name.endswith("_seconds")}
    print(f"4 s in the voice of a recording of 3 s: {seconds} s; peak {memory['peak'] / 1e9:.2f} GB")


@pytest.fixture(scope="module")
def llasa(tmp_path_factory):
    """A folder like HKUSTAudio/Llasa-1B: 2.74 GB, 193,800 tokens with the real ids."""
    folder = tmp_path_factory.mktemp("llasa-1b")
    text = checkpoints.LLAMA_TOKENS
    filler = [f"<|unused_{i}|>" for i in range(128_256 - 300 - len(text))]
    codes = [f"<|s_{i}|>" for i in range(65_536)]
    made = checkpoints.tokenizer(folder, *text, *filler, *checkpoints.LLASA_TOKENS, *codes)
    assert made.token_to_id("<|s_0|>") == 128_264
    config = transformers.LlamaConfig(**LLASA_1B, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = shapes_of(transformers.LlamaForCausalLM(config))
    del shapes["lm_head.weight"]
    random_weights(folder / "model.safetensors", shapes, ml_dtypes.bfloat16)
    return folder


@pytest.fixture(scope="module")
def xcodec2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xcodec2")
    config = transformers.Xcodec2Config()
    (folder / "config.json").write_text(config.to_json_string())
    with torch.device("meta"):
        shapes = shapes_of(transformers.Xcodec2Model(config))
    random_weights(folder / "model.safetensors", shapes, np.float32)
    return folder


def test_llasa_1b_from_conversion_to_a_wave(llasa, xcodec2, tmp_path):
    model, draft, codec = tmp_path / "model", tmp_path / "draft", tmp_path / "model" / "codec"
    (figures,) = run(CONVERT, llasa, model, tmp_path / "copy", "", "all")
    converted, copied = (statistics.median(figures[name]) for name in ("seconds", "copy_seconds"))
    above = (figures["peak"] - figures["before"]) / 1e9
    print(f"\nLLaSA-1B, {figures['bytes'] / 1e9:.2f} GB: converted in {converted:.1f} s, {converted / copied:.2f} times a copy")
    print(f"  of {copied:.1f} s; peak {above:.2f} GB above the interpreter's {figures['before'] / 1e9:.2f} GB")
    assert above < 2
    assert converted < 4 * copied
    for source, dest, layers in ((llasa, draft, "0,8,15"), (xcodec2, codec, "")):
        (figures,) = run(CONVERT, source, dest, "", layers, "all")
        print(f"{dest.name}, {figures['bytes'] / 1e9:.2f} GB: converted in {figures['seconds'][0]:.1f} s")
    out = tmp_path / "hello.wav"
    arguments = ["say", "The rain has stopped.", "--model", model, "--draft", draft, "--out", out, "--max-codes", "50", "--json"]
    spoken, memory = run(SAY, *arguments, "--verify", "exact")
    parts = {name: spoken[f"{name}_seconds"] for name in ("compile", "lm", "codec")}
    print(f"50 codes: {parts} s, {spoken['tokens_per_round']:.2f} codes a round; peak {memory['peak'] / 1e9:.2f} GB")
    wave, rate = soundfile.read(out)
    assert rate == 16_000
    assert len(wave) % 320 == 0
    assert spoken["tokens"] == 50


def test_llasa_1b_speaks_in_a_recordings_voice(llasa, xcodec2, tmp_path):
    run(CONVERT, llasa, tmp_path / "model", "", "", "speech")  # each token is a code
    run(CONVERT, xcodec2, tmp_path / "model" / "codec", "", "", "all")
    speak_in_a_recordings_voice(tmp_path / "model", tmp_path, 200)


def test_xcodec2_encodes_four_seconds(xcodec2, tmp_path):
    (figures,) = run(CONVERT, xcodec2, tmp_path / "codec", "", "", "all")
    above = (figures["peak"] - figures["before"]) / 1e9
    print(
        f"\nX-codec2, {figures['bytes'] / 1e9:.2f} GB: converted in {figures['seconds'][0]:.1f} s, {above:.2f} GB above the start"
    )
    assert above < 2
    (figures,) = run(ENCODE, tmp_path / "codec")
    load, first, *again = figures["seconds"]
    loaded, peak = (number / 1e9 for number in figures["peaks"])
    print(f"loaded in {load:.1f} s, peak {loaded:.2f} GB; 4 s encoded in {min(again):.1f} s, {first:.1f} s with compilation,")
    print(f"  {min(figures['processor'][1:]):.1f} s of processors; peak {peak:.2f} GB")
    assert figures["codes"] == [201, 1]
    assert peak < 5


@pytest.mark.parametrize("version", [2, 3])
def test_cosyvoice_from_its_files_to_four_seconds_of_speech(version, tmp_path):
    source, model = tmp_path / f"CosyVoice{version}", tmp_path / "model"
    cosyvoice_folders.make(source, version, small=False)
    cosyvoice_folders.models.cache_clear()
    (figures,) = run(CONVERT, source, model, "", "", "all")
    above = (figures["peak"] - figures["before"]) / 1e9
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 1e9
    print(f"\nCosyVoice {version}, {size:.2f} GB: converted in {figures['seconds'][0]:.1f} s, {above:.2f} GB above the start")
    assert above < 2
    speak_in_a_recordings_voice(model, tmp_path, 100)
