"""Acoustic similarity groups against brute force, their files, and swaps within groups."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import assert_distribution

from jaxspec import groups
from jaxspec.checkpoint import groups as group_files
from jaxspec.commands.groups import plot_sizes, summarize

CODES = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def brute_force(embeddings, threshold, single=()):
    """G(t) of every token, as sets."""
    unit = np.float64(embeddings) / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similar = unit @ unit.T > threshold
    similar[list(single)] = False
    similar[:, list(single)] = False
    return [frozenset(np.flatnonzero(row)) | {token} for token, row in enumerate(similar)]


def as_sets(table):
    vocab = len(table.token_start)
    rows = [frozenset(row[row < vocab].tolist()) for row in np.asarray(table.members)]
    np.testing.assert_array_equal(table.sizes, [len(row) for row in rows])
    return rows


def assert_index(table):
    """The index from tokens to groups agrees with the members."""
    rows = as_sets(table)
    for token, (start, count) in enumerate(zip(table.token_start, table.token_count, strict=True)):
        listed = np.asarray(table.token_groups)[start : start + count].tolist()
        assert listed == [k for k, row in enumerate(rows) if token in row]


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.4, 0.9])
@pytest.mark.parametrize("block", [7, 1024])
def test_equals_brute_force(threshold, block):
    expected = brute_force(CODES, threshold)
    per_token = groups.acoustic_similarity_groups(CODES, threshold, distinct=False, block=block)
    assert as_sets(per_token) == expected
    assert_index(per_token)
    distinct = groups.acoustic_similarity_groups(CODES, threshold, block=block)
    assert as_sets(distinct) == list(dict.fromkeys(expected))
    assert_index(distinct)


def test_duplicates_are_one_group_unless_asked_for():
    twins = np.repeat(np.eye(3), 2, axis=0)
    assert as_sets(groups.acoustic_similarity_groups(twins, 0.5)) == [{0, 1}, {2, 3}, {4, 5}]
    per_token = groups.acoustic_similarity_groups(twins, 0.5, distinct=False)
    assert len(per_token.sizes) == 6
    np.testing.assert_array_equal(per_token.token_count, [2] * 6)


def test_stop_ids_untrained_and_zero_rows_are_singletons():
    embeddings = np.ones((8, 4)) + 0.01 * np.random.default_rng(0).normal(size=(8, 4))
    embeddings[2] = 0
    trained = np.arange(8) != 4
    table = groups.acoustic_similarity_groups(embeddings, 0.5, num_codes=6, trained=trained)
    assert as_sets(table) == [{0, 1, 3, 5}, {2}, {4}, {6}, {7}]
    # A cosine of 0 would be above a negative threshold.
    assert as_sets(groups.acoustic_similarity_groups(embeddings, -0.5, num_codes=6, trained=trained)) == as_sets(table)


def test_progress_reaches_the_number_of_rows():
    seen = []
    groups.acoustic_similarity_groups(CODES, 0.4, block=20, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(20, 50), (40, 50), (50, 50)]


def test_groups_are_symmetric_and_no_cosine_passes_one():
    rows = np.repeat(CODES[:20], 3, axis=0) * np.random.default_rng(1).uniform(0.1, 9, (60, 1)).astype(np.float32)
    table = groups.acoustic_similarity_groups(rows, np.nextafter(np.float32(1), np.float32(0)), distinct=False, block=13)
    sets = as_sets(table)
    assert all(token in sets[other] for token, row in enumerate(sets) for other in row)
    assert set(as_sets(groups.acoustic_similarity_groups(rows, 1.0))) == {frozenset([t]) for t in range(60)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -1.0}, "threshold to be a cosine"),
        ({"threshold": 1.01}, "threshold to be a cosine"),
        ({"threshold": float("nan")}, "threshold to be a cosine"),
        ({"threshold": 1e300}, "threshold to be a cosine"),
        ({"threshold": True}, "threshold to be a cosine"),
        ({"threshold": -1 + 1e-12}, "threshold to be a cosine"),  # -1 in float32
        ({"embeddings": np.where(np.arange(50)[:, None] == 9, np.nan, CODES)}, "in row 9: replace it"),
        ({"embeddings": CODES[0]}, "to be a matrix"),
        ({"num_codes": 51}, "expected num_codes from 0 to 50"),
        ({"num_codes": True}, "expected num_codes from 0 to 50"),
        ({"num_codes": 2.0}, "expected num_codes from 0 to 50"),
        ({"trained": np.ones(49, bool)}, "expected trained to have one flag"),
        ({"block": 0}, "expected block to be"),
        ({"block": True}, "expected block to be"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        groups.acoustic_similarity_groups(**{"embeddings": CODES, "threshold": 0.4, **change})


def test_giant_groups_are_refused(monkeypatch):
    table = groups.acoustic_similarity_groups(CODES, -0.9, distinct=False)
    needed = 32 * int(table.sizes.sum()) + 8 * table.members.size
    monkeypatch.setattr(groups, "_LIMIT_BYTES", needed)
    groups.acoustic_similarity_groups(CODES, -0.9, distinct=False)
    monkeypatch.setattr(groups, "_LIMIT_BYTES", needed - 1)
    with pytest.raises(ValueError, match=f"for {int(table.sizes.sum()):,} pairs of tokens: raise the threshold"):
        groups.acoustic_similarity_groups(CODES, -0.9, distinct=False)
    star = np.concatenate([np.ones((30, 2)), np.zeros((970, 2))])
    monkeypatch.setattr(groups, "_LIMIT_BYTES", 32 * (30 + 970) + 8 * 30 * 971 - 1)
    with pytest.raises(ValueError, match="raise the threshold"):
        groups.acoustic_similarity_groups(star, 0.5)
    # Found in the first strip, not after all pairs are in memory.
    monkeypatch.setattr(groups, "_LIMIT_BYTES", 32 * 60)
    with pytest.raises(ValueError, match="raise the threshold"):
        groups.acoustic_similarity_groups(CODES, -0.9, block=7, progress=lambda done, total: pytest.fail("too late"))


@pytest.mark.parametrize("distinct", [True, False])
def test_the_memory_guard_covers_the_peak(distinct):
    """Host memory by tracemalloc, to which the device's copy of the table is added."""
    embeddings = np.repeat(np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32), 256, axis=0)
    tracemalloc.start()
    try:
        table = groups.acoustic_similarity_groups(embeddings, 0.999, distinct=distinct, block=16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    pairs = 1024 * 256
    counted = groups._BYTES_PER_PAIR * pairs + groups._BYTES_PER_CELL * table.members.size
    assert 0.4 * counted < peak + 4 * table.members.size < counted


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(np.float32, -149), (np.float32, -126), (np.float32, 119), (np.float64, -1000), (np.float64, 1000)]
)
def test_rows_of_any_norm_have_their_direction(dtype, exponent):
    """Below float32's smallest normal number, near its largest, and beyond both; mixed with ordinary rows."""
    rows = np.round(CODES * 64)  # small whole numbers: exact at every scale
    scaled = rows.astype(dtype)
    scaled[::2] = np.ldexp(scaled[::2], exponent)
    expected = groups.acoustic_similarity_groups(rows, 0.4)
    jax.tree.map(np.testing.assert_array_equal, groups.acoustic_similarity_groups(scaled, 0.4), expected)


def test_the_norm_of_the_smallest_numbers_is_not_rounded():
    """In units of the smallest float32 the norm of (1, 1) would round from 1.41 to 1, and its cosine with (1, 0) to 1."""
    smallest = np.finfo(np.float32).smallest_subnormal
    table = np.array([[smallest, smallest], [1, 0], [smallest, 0]], np.float32)
    assert as_sets(groups.acoustic_similarity_groups(table, 0.8)) == [{0}, {1, 2}]


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_a_cosine_equal_to_the_threshold_is_excluded(kind):
    """cos = 0.6 exactly, and float32 rounds it up, so that a float64 threshold would lie below it."""
    table = np.array([[1, 0], [3, 4]])
    assert float(np.float32(0.6)) > 0.6
    assert as_sets(groups.acoustic_similarity_groups(table, kind(0.6))) == [{0}, {1}]
    assert as_sets(groups.acoustic_similarity_groups(table, kind(0.5999))) == [{0, 1}]


@pytest.mark.parametrize("distinct", [True, False])
def test_offset_groups_are_shifted_and_the_rest_are_singletons(distinct):
    tables, firsts = (CODES[:10], CODES[10:15]), (7, 30)
    parts = [groups.acoustic_similarity_groups(table, 0.2, distinct=distinct) for table in tables]
    joined = groups.offset_groups(parts, firsts, 40)
    expected = [
        frozenset(token + first for token in row)
        for table, first in zip(tables, firsts, strict=True)
        for row in (list(dict.fromkeys(brute_force(table, 0.2))) if distinct else brute_force(table, 0.2))
    ]
    singletons = [frozenset([token]) for token in range(40) if not (7 <= token < 17 or 30 <= token < 35)]
    assert as_sets(joined) == expected + singletons
    assert max(map(len, expected)) > 1
    assert_index(joined)


def test_slots_with_the_same_vectors_are_never_in_one_group():
    part = groups.acoustic_similarity_groups(CODES[:10], -0.5)
    joined = groups.offset_groups([part] * 3, [2, 12, 22], 32)
    assert len(as_sets(joined)) == 2 + 3 * len(as_sets(part))
    assert all(len({(token - 2) // 10 for token in row}) == 1 for row in as_sets(joined))
    whole = groups.acoustic_similarity_groups(CODES[:5], 0.2)
    jax.tree.map(np.testing.assert_array_equal, groups.offset_groups([whole], [0], 5), whole)


def test_save_and_load(tmp_path):
    path = tmp_path / "groups.npz"
    for distinct in (True, False):
        table = groups.acoustic_similarity_groups(CODES, 0.3, num_codes=45, distinct=distinct)
        group_files.save(path, table)
        jax.tree.map(np.testing.assert_array_equal, group_files.load(path), table)
    assert [file.name for file in tmp_path.iterdir()] == ["groups.npz"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "groups.npz"
    group_files.save(path, groups.acoustic_similarity_groups(CODES, 0.3))
    whole = path.read_bytes()
    for bad in (b"", b"nonsense", whole[: len(whole) // 2], whole[:200] + bytes(20) + whole[220:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            group_files.load(path)
    good = {"vocab": 3, "sizes": np.int32([2, 2]), "tokens": np.int32([0, 1, 1, 2])}
    np.savez(path, **good)
    assert as_sets(group_files.load(path)) == [{0, 1}, {1, 2}]
    for change in (
        {"vocab": 4},
        {"vocab": -1},
        {"sizes": np.int32([2, 3])},
        {"sizes": np.int32([4, 0])},
        {"sizes": np.int32([])},
        {"sizes": np.int64([2, 2])},
        {"tokens": np.int32([0, 1, 1, 3])},
        {"tokens": np.int32([0, 1, 2, 1])},
        {"tokens": np.int32([0, 1, 2, 2])},
        {"tokens": np.ones(4)},
    ):
        np.savez(path, **{**good, **change})
        with pytest.raises(ValueError, match="whole vocabulary"):
            group_files.load(path)
    with pytest.raises(FileNotFoundError):
        group_files.load(tmp_path / "none.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "groups.npz"
    path.write_bytes(b"old")
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        group_files.save(path, groups.acoustic_similarity_groups(CODES, 0.3))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_swap_has_its_distribution():
    """Chi-square with a fixed seed; with fresh ones a false alarm once in 10,000 runs."""
    table = groups.acoustic_similarity_groups(CODES[:12], 0.2)
    membership = (np.asarray(table.members)[:, :, None] == np.arange(12)).any(1)
    for token in (0, 5):
        groups_of = membership[:, token]
        probs = (membership[groups_of] / membership[groups_of].sum(1, keepdims=True)).mean(0)
        drawn = groups.swap(jax.random.key(1), table, jnp.full((100, 200), token))
        assert_distribution(drawn, probs)


def test_report_and_plot(tmp_path):
    table = groups.acoustic_similarity_groups(np.repeat(np.eye(3), [3, 2, 1], axis=0), 0.5)
    summary = summarize(table)
    assert (summary["groups"], summary["size_mean"], summary["size_max"], summary["singletons"]) == (3, 2.0, 3, 1)
    assert summary["memory_bytes"] == 4 * (9 + 3 + 6 + 6 + 6)
    plot_sizes(table, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
