"""Acoustic similarity groups: which speech tokens sound alike, from the cosine of their embeddings."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.types import Array

_LIMIT_BYTES = 4 << 30  # of the table of members, and of the list of pairs that it is made from


class Groups(NamedTuple):
    """M groups of a vocabulary of V tokens, which may overlap; each token is in one at least.

    S(t), the groups of token t, is token_groups[token_start[t] : token_start[t] + token_count[t]].
    """

    members: Array  # int32 [M G], the tokens of each group in ascending order, padded with V, which is no token
    sizes: Array  # int32 [M]
    token_groups: Array  # int32 [the sum of the sizes]
    token_start: Array  # int32 [V]
    token_count: Array  # int32 [V]


def acoustic_similarity_groups(
    embeddings: np.ndarray | Array,
    threshold: float,
    *,
    num_codes: int | None = None,
    trained: np.ndarray | None = None,
    distinct: bool = True,
    block: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Groups:
    """Groups tokens whose embeddings have a cosine above a threshold: equation 1 of PCG (arXiv 2511.13732).

    G(t) = {t' : cos(Emb(t), Emb(t')) > threshold}, and t itself. The paper found 0.38 to 0.45 best. On the host, by strips of
    ``block`` rows: the peak is one float32 copy of the embeddings, ``block`` x V x 5 bytes, and 48 bytes for each pair of tokens
    in one group. For 65,536 x 4,096 that is 1.07 GB + 0.34 GB + 0.44 GB at 140 tokens to a group, where a V x V matrix has 17 GB.

    Args:
        embeddings: [V D], the target's input embeddings of the head's vocabulary, or the codec's code vectors with zero rows for
            the stop ids. A row of zeros has no direction: its token is alone.
        threshold: in (-1, 1].
        num_codes: the ids from here on are not speech codes (stop ids) and stay alone. None: all are codes.
        trained: bool [V]; tokens that never occurred in training share a meaningless direction, so they stay alone.
        distinct: the groups are the distinct sets among G(t), as in the paper. False: one group per token, duplicates
            included, so that S(t) = {k : t in G(k)} has as many groups as G(t) has tokens.
        block: rows at a time.
        say: is told after each block how many rows are done, and of how many.

    Raises:
        ValueError: a threshold outside (-1, 1], embeddings that are not a finite matrix, a ``num_codes`` or ``trained`` that does
            not fit them, or groups so large that their table would pass 4 GB.

    >>> acoustic_similarity_groups(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 0.9).members.tolist()
    [[0, 1], [2, 3]]
    """
    unit, single = _directions(embeddings, threshold, num_codes, trained, block)
    vocab = len(unit)
    pairs = _similar_pairs(unit, single, threshold, block, progress or (lambda done, all: None))
    centre, token = np.divmod(pairs, vocab)
    sets = np.split(token.astype(np.int32), np.searchsorted(centre, np.arange(1, vocab)))
    if distinct:
        sets = list({members.tobytes(): members for members in sets}.values())
    return tabulate(sets, vocab)


def _directions(
    embeddings: np.ndarray | Array, threshold: float, num_codes: int | None, trained: np.ndarray | None, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Checks the input; the unit rows float32 [V D], and which tokens stay alone, bool [V]."""
    if not -1 < threshold <= 1:
        raise ValueError(f"the threshold is a cosine and must be in (-1, 1], but is {threshold!r}")
    if block < 1:
        raise ValueError(f"block must be 1 row or more, but is {block}")
    unit = np.array(embeddings, np.float32)
    if unit.ndim != 2 or 0 in unit.shape:
        raise ValueError(f"the embeddings must be a matrix [V D], but have shape {unit.shape}")
    vocab = len(unit)
    norm = np.sqrt(np.einsum("vd,vd->v", unit, unit, dtype=np.float64))
    if not np.isfinite(norm).all():
        raise ValueError(f"the embeddings must be finite, but row {int(np.argmin(np.isfinite(norm)))} is not")
    codes = vocab if num_codes is None else num_codes
    if not 0 <= codes <= vocab:
        raise ValueError(f"num_codes must be from 0 to the {vocab} rows of the embeddings, but is {num_codes}")
    single = (norm == 0) | (np.arange(vocab) >= codes)
    if trained is not None:
        if np.shape(trained) != (vocab,):
            raise ValueError(f"trained must have one flag for each of the {vocab} rows, but has shape {np.shape(trained)}")
        single |= ~np.asarray(trained, bool)
    unit /= np.maximum(norm, np.finfo(np.float32).tiny)[:, None].astype(np.float32)
    return unit, single


def _similar_pairs(
    unit: np.ndarray, single: np.ndarray, threshold: float, block: int, progress: Callable[[int, int], None]
) -> np.ndarray:
    """The sorted codes t * V + t' of all pairs in one group. Each product is made once and mirrored, so that the relation is
    symmetric whatever the rounding."""
    vocab = len(unit)
    found = [np.arange(vocab, dtype=np.int64) * (vocab + 1)]
    count = vocab
    for start in range(0, vocab, block):
        left, right = _pairs_from(start, unit, single, threshold, block)
        count += 2 * len(left)
        if 4 * count > _LIMIT_BYTES:
            raise ValueError(f"more than {count:,} pairs of tokens have a cosine above {threshold}: raise the threshold")
        found += [left * vocab + right, right * vocab + left]
        progress(min(start + block, vocab), vocab)
    return np.sort(np.concatenate(found))


def _pairs_from(start: int, unit: np.ndarray, single: np.ndarray, threshold: float, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The similar pairs t < t' with t in one block of rows."""
    cosine = unit[start : start + block] @ unit[start:].T
    # Cosines above 1 are rounding, and no cosine is above a threshold of 1.
    similar = cosine > threshold if threshold < 1 else np.zeros(cosine.shape, bool)
    similar[single[start : start + block]] = False
    similar[:, single[start:]] = False
    left, right = np.nonzero(similar)
    above = left < right
    return left[above] + start, right[above] + start


def tabulate(sets: list[np.ndarray], vocab: int) -> Groups:
    """Pads the groups and makes the index from tokens to groups."""
    sizes = np.array([len(members) for members in sets], np.int32)
    if 4 * sizes.size * int(sizes.max()) > _LIMIT_BYTES:
        raise ValueError(
            f"the largest of {sizes.size:,} groups has {sizes.max():,} tokens, so their table would pass "
            f"{_LIMIT_BYTES >> 30} GB: raise the threshold, or leave untrained tokens out (trained=)"
        )
    members = np.full((sizes.size, sizes.max()), vocab, np.int32)
    tokens = np.concatenate(sets)
    members[np.arange(sizes.max()) < sizes[:, None]] = tokens
    count = np.bincount(tokens, minlength=vocab).astype(np.int32)
    groups = np.repeat(np.arange(sizes.size, dtype=np.int32), sizes)[np.argsort(tokens, kind="stable")]
    start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int32)
    return Groups(*map(jnp.asarray, (members, sizes, groups, start, count)))


def offset_groups(parts: Sequence[Groups], firsts: Sequence[int], vocab: int) -> Groups:
    """Groups of a vocabulary of ``vocab`` tokens, whose token ``firsts[i]`` is token 0 of ``parts[i]``; all others are alone."""
    sets, alone = [], np.ones(vocab, bool)
    for part, first in zip(parts, firsts, strict=True):
        sets += [
            np.asarray(row[:size]) + first for row, size in zip(np.asarray(part.members), np.asarray(part.sizes), strict=True)
        ]
        alone[first : first + len(part.token_start)] = False
    return tabulate([*sets, *np.flatnonzero(alone)[:, None].astype(np.int32)], vocab)


def pick_group(uniform: Array, groups: Groups, tokens: Array) -> Array:
    """One of the groups of each token, all alike: K ~ w[., t] with w[k, t] = 1 / |S(t)|. All arrays [...], uniforms in [0, 1)."""
    count = groups.token_count[tokens]
    # The product may round up to the count.
    nth = jnp.minimum((uniform * count).astype(jnp.int32), count - 1)
    return groups.token_groups[groups.token_start[tokens] + nth]


def swap(key: Array, groups: Groups, tokens: Array) -> Array:
    """Replaces each token [...] by a random member of a random one of its groups: the test of PCG's Table 2.

    Token t becomes t' with probability sum over k in S(t) and S(t') of 1 / (|S(t)| |G_k|). The key is consumed.
    """
    which, member = jax.random.uniform(key, (2, *tokens.shape))
    group = pick_group(which, groups, tokens)
    size = groups.sizes[group]
    return groups.members[group, jnp.minimum((member * size).astype(jnp.int32), size - 1)]
