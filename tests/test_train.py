"""The recipe of the voice: shards, alignment, examples and batches; the training loop: resuming and its errors."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.codec import fsq
from jaxspec.models import transformer
from jaxspec.models.builtin import CODES, LEVELS, PROMPT_ROWS, STOP, VOCAB
from jaxspec.train.loop import TrainConfig, fit, load_ema
from jaxspec.train.voice import corpus, language_model
from jaxspec.train.voice.alignment import align
from jaxspec.train.voice.language_model import IGNORE, Reading

TINY = transformer.Config((VOCAB, PROMPT_ROWS), VOCAB, 8, 2, 2, 1, 4, 8)
PHONES = [("pau", 0.2), ("hh", 0.28), ("ax", 0.36), ("l", 0.44), ("ow", 0.6), ("pau", 0.8)]


def recording(**changes):
    """ "hello." as flite might record it, 20 codes long."""
    codes = np.random.default_rng(0).integers(CODES, size=20).astype(np.uint16)
    return corpus.Recording("hello.", "slt", PHONES, codes)._replace(**changes)


@pytest.mark.parametrize(
    ("phones", "symbols", "expected"),
    [
        ("pau hh ax l ow pau", "< HH AH0 L OW1 . >", "0 1 2 3 4 5"),
        ("pau b aa k s pau", "< b o x . >", "0 1 2 3 3 4"),  # one letter for two phones
        ("pau n ay t pau", "< n i g h t . >", "0 1 2 5 6"),  # silent letters are skipped
        ("pau dh ax pau k ae t pau", "< DH AH0 , S K AE1 T . >", "0 1 2 3 5 6 7 8"),  # punctuation with a pause
    ],
)
def test_alignment_follows_the_text(phones, symbols, expected):
    assert align(phones.split(), symbols.split()).tolist() == [int(i) for i in expected.split()]


def test_shards_are_read_as_written_and_written_atomically(tmp_path):
    written = [recording(), recording(text="no.", signal=np.arange(7, dtype=np.uint16))]
    corpus.write_shard(tmp_path / "a.npz", written)
    for before, after in zip(written, corpus.read_shard(tmp_path / "a.npz"), strict=True):
        assert after.text == before.text
        assert after.phones == before.phones
        np.testing.assert_array_equal(after.signal, before.signal)
    with pytest.raises(TypeError):
        corpus.write_shard(tmp_path / "b.npz", [recording(text=object())])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_row_has_every_code_and_the_stop_as_targets_and_the_position_of_each():
    row = language_model.row(recording(), Reading(spell=0.0, disturb=0.0), np.random.default_rng(0), 0.04)
    codes = recording().signal.tolist()
    prompt = 2 + len(["HH", "AH0", "L", "OW1", "."])
    assert row.tokens[prompt:].tolist() == codes
    assert row.target.tolist() == [IGNORE] * (prompt - 1) + [*codes, STOP]
    assert {part.dtype for part in row} == {np.dtype(np.int32)}
    looked = row.look[prompt - 1 :].tolist()
    assert looked == [0] * 5 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 4 + [5] * 5 + [prompt - 1]


def test_samples_of_the_target_have_no_positions():
    row = language_model.row(recording(phones=[]), Reading(), np.random.default_rng(0), 0.04)
    assert (row.look == IGNORE).all()
    assert (row.target >= 0).sum() == 21


def test_disturbed_codes_move_by_one_level_in_one_digit():
    codes = np.random.default_rng(1).integers(CODES, size=400)
    moved = language_model._disturb(codes, 0.5, np.random.default_rng(2))
    apart = np.abs(
        np.asarray(fsq.to_digits(jnp.asarray(moved), LEVELS)) - np.asarray(fsq.to_digits(jnp.asarray(codes), LEVELS))
    ).sum(1)
    assert set(apart.tolist()) == {0, 1}
    assert 0.3 < apart.mean() < 0.5


def test_batches_hold_rows_of_similar_length(tmp_path):
    corpus.write_shard(tmp_path / "a.npz", [recording(), recording(signal=np.zeros(60, np.uint16))] * 8)
    reading = Reading(buckets=(32, 80), tokens=160)
    for batch in itertools.islice(language_model.batches([tmp_path], reading, 0.04, 0), 6):
        assert batch.tokens.shape in ((5, 32), (2, 80))
        assert (batch.target[:, :6] == IGNORE).all()


def test_codes_that_share_digits_share_embeddings():
    params = language_model.init_params(jax.random.key(0), TINY)
    features = language_model.digit_features()
    assert features.shape[0] == VOCAB
    assert (features[:CODES].sum(1) == 15).all()  # 5 digits and 10 pairs
    assert (features[STOP] == 0).all()
    composed = language_model.compose(params, features)
    assert jax.tree.structure(composed) == jax.tree.structure(transformer.init_params(jax.random.key(0), TINY))
    table = composed["table_0"] - params["model"]["table_0"]
    near, far = fsq.to_codes(jnp.array([[3, 2, 2, 2, 2], [3, 2, 2, 2, 3], [0, 0, 0, 0, 0]]), LEVELS)[jnp.array([[0, 1], [0, 2]])]
    assert jnp.linalg.norm(table[near[0]] - table[near[1]]) < jnp.linalg.norm(table[far[0]] - table[far[1]])


def test_training_lowers_the_loss_and_resumes_to_the_same_weights(tmp_path):
    corpus.write_shard(tmp_path / "a.npz", [recording()] * 4)
    reading = Reading(buckets=(32,), tokens=64, disturb=0.0)
    loss = language_model.loss(TINY, (1,))

    def train(name, steps, stop_at=None):
        config = TrainConfig(steps, 1e-2, warmup_steps=2, checkpoint_every=4, log_every=2)
        start = language_model.init_params(jax.random.key(0), TINY)
        source = language_model.batches([tmp_path], reading, 0.04, 0)
        fixed = next(source)  # always the same batch, so that a resumed run sees those of the whole run
        batches = itertools.repeat(fixed) if stop_at is None else itertools.chain([fixed] * stop_at, iter(()))
        return fit(tmp_path / name, start, loss, lambda _: batches, config)

    whole = train("whole", 12)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000
    with pytest.raises(RuntimeError, match="expected batches without end"):
        train("parts", 12, stop_at=9)
    parts = train("parts", 12)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    again = load_ema(tmp_path / "parts", language_model.init_params(jax.random.key(0), TINY))
    jax.tree.map(np.testing.assert_array_equal, parts, again)
