"""Chunks of a stream, joined, against the whole, at the true sizes of the codecs that look ahead: samples and spectra.

By hand, with the figures: pytest -m "slow or not slow" -s -n 0 tests/test_stream_distance.py
"""

import numpy as np
import pytest
import snac
import torch
from checkpoints import SNAC, folded, planned

from jaxspec.codec import padding
from jaxspec.codec import snac as snac_codec
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.convert.snac import config
from jaxspec.synthesis import builtin
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak
from jaxspec.synthesis.slots import Row
from jaxspec.synthesis.windows import Windows

TEXT = "One day we met. The rain has stopped, so we can go for a walk along the river."


def log_spectral_distance(wave, reference, size=1024):
    """Decibels: over each frame the root of the mean square difference of the log power spectra, and of the frames the mean.

    Power more than 80 dB below the loudest of the reference counts as if it were that.
    """
    window = np.hanning(size)
    frames = [np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), size)[:: size // 4] for x in (wave, reference)]
    power = [np.abs(np.fft.rfft(frame * window)) ** 2 for frame in frames]
    db = [10 * np.log10(np.maximum(each, 1e-8 * power[1].max())) for each in power]
    return np.sqrt(np.mean((db[0] - db[1]) ** 2, axis=1)).mean()


def builtin_voice():
    """The voice as shipped, and codes that it speaks."""
    voice, settings = builtin.builtin(), Settings(verify="autoregressive", seed=3)
    codes = speak(TEXT, settings, voice).utterances[0].codes
    return codes, voice.context_frames, lambda rows: voice.decode(rows, settings, Stopwatch())


def snac_24khz():
    """SNAC of 24 kHz as Orpheus speaks with it, with random weights and codes."""
    torch.manual_seed(0)
    given = SNAC | {"decoder_dim": 1024, "decoder_rates": [8, 8, 4, 2], "codebook_size": 4096, "codebook_dim": 8}
    given |= {"encoder_dim": 48, "encoder_rates": [2, 4, 8, 8]}
    tensors = folded({name: value.numpy() for name, value in snac.SNAC(**given).state_dict().items()})
    settings, rules = config({name: tensor.shape for name, tensor in tensors.items()}, given)
    codec, params = snac_codec.codec(settings), planned(tensors, rules, snac_codec.abstract_params(settings))
    codes = np.random.default_rng(0).integers(0, 4096, (30, 7), np.int32)
    return codes, codec.context_frames, lambda rows: padding.decode_rows(codec, params, rows)


def joined(codes, context, decode):
    """The chunks of a row whose codes come one frame after the other, joined."""

    def frames(ids):
        at = np.arange(len(ids)).reshape(-1, *codes.shape[1:])
        return ids.reshape(at.shape), at

    windows = Windows(builtin.builtin()._replace(codes=frames, context_frames=context), Settings())
    rows = [Row(codes[:count].ravel(), np.zeros(codes[:count].size, np.int8)) for count in range(1, len(codes) + 1)]
    rows[-1].stop_reason = 1
    taken = [window for row in rows for window in windows.take(row)]
    assert len(taken) > 4
    return np.concatenate([window.cut(wave) for window, wave in zip(taken, decode([w.codes for w in taken]), strict=True)])


@pytest.mark.parametrize("made", [builtin_voice, pytest.param(snac_24khz, marks=pytest.mark.slow)])
def test_chunks_joined_cannot_be_told_from_the_whole(made):
    codes, context, decode = made()
    assert min(context) > 0  # it looks ahead
    whole = np.clip(decode([codes])[0], -1, 1)
    wave = joined(codes, context, decode)
    difference, distance = np.abs(wave - whole).max(), log_spectral_distance(wave, whole)
    blind = log_spectral_distance(joined(codes, (0, 0), decode), whole)
    print(f"{made.__name__}: samples differ by {difference:.1e} of {np.abs(whole).max():.2f}, spectra by {distance:.1e} dB")
    print(f"without context spectra differ by {blind:.2f} dB")
    assert whole.std() > 0.01
    assert difference < 1e-4
    assert distance < 0.01, distance
    assert blind > 100 * distance  # it is a measure that a fault would show in
