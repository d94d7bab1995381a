"""HiFT in pieces: joined they are the whole wave, or what CosyVoice 2's program gives."""

import jax
import numpy as np
import pytest
import reference_hift
from test_acoustic_hift import BINS, SPAN, converted, tensors_of

from jaxspec.acoustic.hift import vocoder
from jaxspec.acoustic.stream import context_frames, exact, faded

FRAMES, PIECE = 120, 23
LENGTH = np.array([120, 61, 23, 9], np.int32)
KEYS = jax.random.split(jax.random.key(3), len(LENGTH))


def mels():
    return np.random.default_rng(0).normal(size=(len(LENGTH), FRAMES, BINS)).astype(np.float32)


def streamed(stream, params, mel, pieces, key):
    """The wave of each row, given ``pieces`` [row] of the numbers of frames at each step; 0 for a step that it sits out."""
    cache, place = stream.init(len(mel)), np.zeros(len(mel), np.int32)
    waves, steps = [[] for _ in mel], max(map(len, pieces))
    for step in range(steps):
        length = np.array([row[step] if step < len(row) else 0 for row in pieces], np.int32)
        final = np.array([step == len(row) - 1 for row in pieces])
        given = np.full((len(mel), PIECE, BINS), 1e3, np.float32)
        for new, row, start, count in zip(given, mel, place, length, strict=True):
            new[:count] = row[start : start + count]
        wave, samples, cache = stream.step(params, cache, given, length, final, key)
        assert wave.shape == (len(mel), (stream.held_frames + PIECE) * SPAN)
        for out, row, count, going in zip(waves, np.asarray(wave), samples, [step < len(p) for p in pieces], strict=True):
            np.testing.assert_array_equal(row[count:], 0)
            out.extend([row[:count]] if going else [])
        place += length
    return [np.concatenate(out) for out in waves]


PIECES = [[23, 23, 1, 23, 0, 23, 23, 4], [5, 3, 23, 23, 7], [23], [8, 1]]


@pytest.mark.parametrize("causal", [False, True])
def test_exact_pieces_are_the_whole_wave(causal):
    settings, params = converted(tensors_of(reference_hift.made(causal)))
    waves = streamed(exact(settings), params, mels(), PIECES, KEYS)
    whole = vocoder(settings).wave(params, mels(), LENGTH, KEYS)
    for row, wanted, length in zip(waves, np.asarray(whole), LENGTH, strict=True):
        assert len(row) == length * SPAN
        np.testing.assert_allclose(row, wanted[: length * SPAN], atol=1e-5)
    assert exact(settings) is exact(settings)


def reach(outputs, frame):
    """How far after and before ``frame``, whose input is not a number, outputs [N] are none: the frames before and after one."""
    (found,) = np.nonzero(np.isnan(np.asarray(outputs).reshape(FRAMES, -1)).any(axis=1))
    return found.max() - frame, frame - found.min()


@pytest.mark.parametrize("causal", [False, True])
def test_context_is_what_the_layers_see(causal):
    settings, params = converted(tensors_of(reference_hift.made(causal)))
    made, frame, length = vocoder(settings), 60, LENGTH[:1].repeat(4)
    mel, source = mels()[:1].repeat(4, axis=0), np.zeros((4, FRAMES * SPAN), np.float32)
    mel[1, frame] = source[2, frame * SPAN : (frame + 1) * SPAN] = np.nan
    waves, pitches = made.decode(params, mel, length, source), made.f0(params, mel, length)
    assert not np.isnan(waves[0]).any()
    lines = 0 if causal else 1  # between the phases of frames
    of_mel, of_source, of_pitch = reach(waves[1], frame), reach(waves[2], frame), reach(pitches[1], frame)
    wanted = tuple(max(a, b + lines + c) for a, b, c in zip(of_mel, of_source, of_pitch, strict=True))
    assert context_frames(settings) == wanted


def test_faded_pieces_are_cosyvoices():
    model = reference_hift.made(False)
    settings, params = converted(tensors_of(model))
    pieces = [[23, 9, 23, 23, 20, 22], [20, 23, 18], [23], [8, 1]]
    waves = streamed(faded(settings), params, mels(), pieces, None)
    for row, mel, sizes in zip(waves, mels(), pieces, strict=True):
        np.testing.assert_allclose(row, reference_hift.streamed(model, mel, sizes), atol=1e-4)
