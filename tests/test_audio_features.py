"""The front-ends against the packages whose features the models were trained on."""

import jax
import numpy as np
import pytest
import scipy.signal
import torch
import transformers
from reference_audio import s3tokenizer_utils

from jaxspec.audio import fbank, mel
from jaxspec.audio.resample import resample

RNG = np.random.default_rng(0)


def speechlike(rate, seconds=1.3, seed=0):
    """Harmonics whose loudness changes, over a little noise, with silence at the end: float32 [N]."""
    rng, t = np.random.default_rng(seed), np.arange(int(rate * seconds)) / rate
    voiced = sum(np.sin(2 * np.pi * 130 * k * t + 3 * np.sin(5 * t)) / k for k in range(1, 30))
    return ((0.1 * voiced * np.sin(3 * t) ** 2 + 1e-3 * rng.normal(size=len(t))) * (t < 0.9 * seconds)).astype(np.float32)


def by_definition(wave, old, new):
    """The sum of the docstring, in float64 but for the phases, which torchaudio divides as torch does; each output by itself."""
    divisor = np.gcd(old, new)
    old, new = old // divisor, new // divisor
    base, made, shift = 0.99 * min(old, new), [], (torch.arange(0, -new, -1) / new).double().numpy()
    for m in range(-(-len(wave) * new // old)):
        q, j = divmod(m, new)
        t = base * ((np.arange(len(wave)) - q * old) / old + shift[j])
        kernel = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2 * base / old, 0)
        made.append(kernel @ wave)
    return np.array(made)


RATES = [
    (48_000, 16_000),
    (44_100, 16_000),
    (44_100, 24_000),
    (22_050, 24_000),
    (24_000, 16_000),
    (16_000, 24_000),
    (16_001, 16_000),
]


@pytest.mark.parametrize(("old", "new"), RATES)
def test_resampling_is_the_sum_that_defines_it(old, new):
    wave = RNG.normal(size=997).astype(np.float32)
    made = resample(wave, old, new)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, by_definition(wave, old, new), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(44_100, 16_000), (16_000, 24_000)])
def test_resampling_is_that_of_scipy_with_the_same_filter(old, new):
    """A polyphase filter of scipy with the kernel at the common rate; its delay is cut off."""
    wave, divisor = speechlike(old, 0.3), np.gcd(old, new)
    up, down = new // divisor, old // divisor
    base = 0.99 * min(up, down)
    half = int(6 * up * down / base)
    t = base * np.arange(-half, half + 1) / (up * down)
    taps = np.sinc(t) * np.cos(np.pi * t / 12) ** 2 * base / down
    theirs = scipy.signal.upfirdn(taps, wave.astype(np.float64), up)[half::down]
    made = resample(wave, old, new)
    np.testing.assert_allclose(made, theirs[: len(made)], atol=3e-6)


def test_resampling_keeps_a_tone_and_drops_what_is_too_high():
    t = np.arange(48_000) / 48_000
    low, high = (np.sin(2 * np.pi * hz * t).astype(np.float32) for hz in (1000, 11_000))
    np.testing.assert_allclose(resample(low, 48_000, 16_000)[100:-100], low[::3][100:-100], atol=2e-3)
    assert np.abs(resample(high, 48_000, 16_000)[100:-100]).max() < 5e-3
    assert resample(low, 48_000, 48_000) is low
    assert resample(low[:0], 48_000, 16_000).shape == (0,)


@pytest.mark.parametrize("scale", [1.0, 32_768.0])
@pytest.mark.parametrize("count", [20_800, 400, 561])
def test_filter_banks_are_kaldis(scale, count):
    kaldi = pytest.importorskip("kaldi_native_fbank", reason="pip install kaldi-native-fbank==1.22.4")
    options = kaldi.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges = 0, True
    options.mel_opts.num_bins, options.mel_opts.low_freq, options.mel_opts.high_freq = 80, 20, 8000
    online, wave = kaldi.OnlineFbank(options), speechlike(16_000)[:count]
    online.accept_waveform(16_000, (scale * wave).tolist())
    online.input_finished()
    theirs = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
    ours = fbank.fbank(wave, scale)
    assert ours.shape == theirs.shape == (fbank.count(count), 80)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_filter_banks_are_those_of_transformers_in_float64():
    wave = speechlike(16_000)
    extractor = transformers.SeamlessM4TFeatureExtractor()
    theirs = extractor(wave, sampling_rate=16_000, do_normalize_per_mel_bins=False, return_tensors="np").input_features
    ours = fbank.fbank(wave, 32_768.0)
    np.testing.assert_allclose(ours, theirs.reshape(-1, 80), atol=1e-5)


def test_filter_banks_of_a_batch_in_jax_are_those_of_numpy():
    waves = np.stack([speechlike(16_000, seed=seed) for seed in range(2)])
    ours = jax.jit(fbank.fbank)(waves)
    assert isinstance(ours, jax.Array)
    np.testing.assert_allclose(ours, np.stack([fbank.fbank(wave) for wave in waves]), atol=1e-3)
    assert fbank.fbank(waves[0, :399]).shape == (0, 80)
    assert fbank.fbank(waves[0, :0]).shape == (0, 80)


@pytest.mark.parametrize("count", [16_000, 20_799, 201])
def test_whispers_mel_is_that_of_s3tokenizer(count):
    wave = speechlike(16_000)[:count]
    theirs = s3tokenizer_utils().log_mel_spectrogram(torch.from_numpy(wave)).numpy().T
    ours = mel.whisper(wave)
    assert ours.shape == theirs.shape == (count // 160, 128)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("fmax_hz", [8000, 12_000])
@pytest.mark.parametrize("count", [24_000, 31_199, 721])
def test_the_mel_of_a_prompt_is_that_of_torch_in_float64(fmax_hz, count):
    wave = speechlike(24_000)[:count]
    padded = torch.nn.functional.pad(torch.from_numpy(wave)[None, None].double(), (720, 720), mode="reflect")[0]
    spectrum = torch.stft(padded, 1920, 480, window=torch.hann_window(1920).double(), center=False, return_complex=True)[0]
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)
    bank = transformers.audio_utils.mel_filter_bank(961, 80, 0, fmax_hz, 24_000, norm="slaney", mel_scale="slaney")
    theirs = torch.log(torch.clamp(torch.from_numpy(bank.T) @ magnitude, min=1e-5)).numpy().T
    ours = mel.prompt(wave, fmax_hz)
    assert ours.shape == theirs.shape == (count // 480, 80)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
