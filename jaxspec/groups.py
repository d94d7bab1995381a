"""Acoustic similarity groups: tokens that sound alike, by the cosine of their embeddings."""

import hashlib
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxspec.keys import threefry_key
from jaxspec.types import Array, KeyLike

_LIMIT_BYTES = 4 << 30  # of host memory beside the embeddings: the pairs of similar tokens, and the table made from them
_BYTES_PER_PAIR = 32  # measured peak of grouping and indexing, an ordered pair of tokens in one group
_BYTES_PER_CELL = 8  # the table of members on the host, and its copy on the device


class Groups(NamedTuple):
    """M groups of a vocabulary of V tokens, which may overlap; each token is in at least one.

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

    G(t) = {t' : cos(Emb(t), Emb(t')) > threshold}, and t itself. The paper found 0.38 to 0.45 best. Cosines and threshold are
    compared in float32, so a cosine that rounds to the threshold is excluded. Runs on the host, in strips of ``block`` rows: the
    peak is one float32 copy of the embeddings, ``block`` x V x 5 bytes, and 32 bytes for each ordered pair of tokens in one
    group. For 65,536 x 4,096 that is 1.07 GB + 0.34 GB + 0.29 GB at 140 tokens a group, where a V x V matrix has 17 GB.

    Args:
        embeddings: [V D], the target's input embeddings of the head's vocabulary, or the codec's code vectors with zero rows for
            the stop ids. Each row is scaled by a power of two first, so rows of any finite norm have their direction; a row of
            zeros has none: its token is a singleton group.
        threshold: in (-1, 1].
        num_codes: the ids from here on are not speech codes (stop ids): singleton groups. None: all are codes.
        trained: bool [V]; tokens that never occurred in training share a meaningless direction, so they are singleton groups.
        distinct: the groups are the distinct sets among G(t), as in the paper. False: one group per token, duplicates
            included, so that S(t) = {k : t in G(k)} has as many groups as G(t) has tokens.
        block: rows at a time.
        progress: called after each block with the number of rows done and of all rows.

    Returns:
        The groups, on the default device.

    Raises:
        ValueError: a threshold outside (-1, 1], embeddings that are not a finite matrix, a ``num_codes`` or ``trained`` that does
            not fit them, or groups so large that making them would take more than 4 GB.

    >>> acoustic_similarity_groups(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 0.9).members.tolist()
    [[0, 1], [2, 3]]
    """
    real = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if not (real and -1 < threshold <= 1 and np.float32(threshold) > -1):
        raise ValueError(f"expected threshold to be a cosine in (-1, 1], got {threshold!r}: 0.4 is a good start")
    if not isinstance(block, numbers.Integral) or isinstance(block, bool) or block < 1:
        raise ValueError(f"expected block to be a number of rows of at least 1, got {block!r}: leave it out for 1024")
    unit = _directions(embeddings, block)
    single = _singletons(unit, num_codes, trained)
    pairs = _similar_pairs(unit, single, np.float32(threshold), block, progress or (lambda done, total: None))
    del unit
    vocab = len(single)
    bounds = np.searchsorted(pairs, np.arange(1, vocab, dtype=np.int64) * vocab)
    pairs %= vocab
    sets = np.split(pairs.astype(np.int32), bounds)
    del pairs
    if distinct:
        sets = list({hashlib.blake2b(members.tobytes(), digest_size=16).digest(): members for members in sets}.values())
    return tabulate(sets, vocab)


def _directions(embeddings: np.ndarray | Array, block: int) -> np.ndarray:
    """Checks the embeddings; their unit rows float32 [V D], zero where a row is zero."""
    table = np.asarray(embeddings)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"expected the embeddings to be a matrix [V D], got shape {table.shape}: pass one row for each token")
    unit = np.empty(table.shape, np.float32)
    for start in range(0, len(table), block):
        strip = table[start : start + block].astype(np.float64)
        finite = np.isfinite(strip).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"expected finite embeddings, got NaN or infinity in row {start + int(np.argmin(finite))}: replace it"
            )
        # Powers of two change no bit of an ordinary row, and bring tiny and huge ones into range.
        exponent = np.frexp(np.abs(strip).max(axis=1))[1]
        unit[start : start + block] = np.ldexp(strip, -exponent[:, None])
    norm = np.sqrt(np.einsum("vd,vd->v", unit, unit, dtype=np.float64))
    unit /= np.where(norm > 0, norm, 1).astype(np.float32)[:, None]
    return unit


def _singletons(unit: np.ndarray, num_codes: int | None, trained: np.ndarray | None) -> np.ndarray:
    """The tokens that are singleton groups whatever their cosines, bool [V]: zero rows, no codes, untrained."""
    vocab = len(unit)
    codes = vocab if num_codes is None else num_codes
    if not isinstance(codes, numbers.Integral) or isinstance(codes, bool) or not 0 <= codes <= vocab:
        raise ValueError(
            f"expected num_codes from 0 to {vocab}, the rows of the embeddings, got {num_codes!r}: pass the codes only"
        )
    single = ~unit.any(axis=1) | (np.arange(vocab) >= codes)
    if trained is not None:
        if np.shape(trained) != (vocab,):
            raise ValueError(
                f"expected trained to have one flag for each of the {vocab} rows, got shape {np.shape(trained)}: pass bool [V]"
            )
        single |= ~np.asarray(trained, bool)
    return single


def _similar_pairs(
    unit: np.ndarray, single: np.ndarray, threshold: np.float32, block: int, progress: Callable[[int, int], None]
) -> np.ndarray:
    """The sorted codes t * V + t' of all ordered pairs in one group, int64; each token is paired with itself.

    Each product is computed once and mirrored, so that the relation is symmetric whatever the rounding.
    """
    vocab = len(unit)
    found = [np.arange(vocab, dtype=np.int64) * (vocab + 1)]
    count = vocab
    for start in range(0, vocab, block):
        left, right = _pairs_from(start, unit, single, threshold, block)
        count += 2 * len(left)
        _check_memory(count, 0)
        found += [left * vocab + right, right * vocab + left]
        progress(min(start + block, vocab), vocab)
    pairs = np.concatenate(found)
    del found
    pairs.sort()
    return pairs


def _pairs_from(
    start: int, unit: np.ndarray, single: np.ndarray, threshold: np.float32, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """The similar pairs t < t' with t in one block of rows."""
    cosine = unit[start : start + block] @ unit[start:].T
    # Cosines above 1 are rounding, and no cosine is above a threshold of 1.
    similar = cosine > threshold if threshold < 1 else np.zeros(cosine.shape, bool)
    similar[single[start : start + block]] = False
    similar[:, single[start:]] = False
    left, right = np.nonzero(similar)
    above = left < right
    return left[above] + start, right[above] + start


def _check_memory(pairs: int, cells: int) -> None:
    """Refuses groups of so many ordered pairs of tokens, in a table of so many cells, before the host runs out of memory."""
    needed = _BYTES_PER_PAIR * pairs + _BYTES_PER_CELL * cells
    if needed > _LIMIT_BYTES:
        raise ValueError(
            f"expected groups that take at most {_LIMIT_BYTES / 2**30:.3g} GB to make, got {needed / 2**30:.3g} GB or more, for "
            f"{pairs:,} pairs of tokens: raise the threshold, or leave untrained tokens out (trained=)"
        )


def tabulate(sets: Sequence[np.ndarray], vocab: int) -> Groups:
    """Pads the groups to a table and makes the index from tokens to groups.

    Args:
        sets: the tokens of each group in ascending order, int32.
        vocab: V; each id below it is in at least one group.

    Returns:
        The groups, in the order of ``sets``.

    Raises:
        ValueError: the table would take more than 4 GB to make.
    """
    sizes = np.array([len(members) for members in sets], np.int32)
    total, largest = int(sizes.sum(dtype=np.int64)), int(sizes.max())
    _check_memory(total, sizes.size * largest)
    tokens = np.concatenate(sets)
    members = np.full((sizes.size, largest), vocab, np.int32)
    members[np.arange(largest) < sizes[:, None]] = tokens
    count = np.bincount(tokens, minlength=vocab).astype(np.int32)
    groups = np.repeat(np.arange(sizes.size, dtype=np.int32), sizes)[np.argsort(tokens, kind="stable")]
    start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int32)
    return Groups(*map(jnp.asarray, (members, sizes, groups, start, count)))


def offset_groups(parts: Sequence[Groups], firsts: Sequence[int], vocab: int) -> Groups:
    """Places groups side by side in a larger vocabulary; all other tokens are singleton groups.

    Args:
        parts: the groups of each part.
        firsts: the id in the larger vocabulary of token 0 of each part; the parts must not overlap.
        vocab: V of the larger vocabulary.

    Returns:
        Groups of ``vocab`` tokens: those of the parts in order, then the singletons.

    >>> pair = acoustic_similarity_groups(np.ones((2, 1)), 0.5)
    >>> offset_groups([pair], [1], 4).members.tolist()
    [[1, 2], [0, 4], [3, 4]]
    """
    sets, single = [], np.ones(vocab, bool)
    for part, first in zip(parts, firsts, strict=True):
        sets += [
            np.asarray(row[:size]) + np.int32(first)
            for row, size in zip(np.asarray(part.members), np.asarray(part.sizes), strict=True)
        ]
        single[first : first + len(part.token_start)] = False
    return tabulate([*sets, *np.flatnonzero(single)[:, None].astype(np.int32)], vocab)


def pick_group(uniform: Float[Array, "*N"], groups: Groups, tokens: Int[Array, "*N"]) -> Int[Array, "*N"]:
    """One of the groups of each token, uniformly: K ~ w[., t] with w[k, t] = 1 / |S(t)|, equation 3 of PCG (arXiv 2511.13732).

    Args:
        uniform: float32 [...] in [0, 1).
        groups: of a vocabulary of V tokens.
        tokens: int32 [...], 0 .. V-1.

    Returns:
        int32 [...], 0 .. M-1.
    """
    count = groups.token_count[tokens]
    # Inside the token's groups even if the caller's uniform rounds to 1.
    nth = jnp.minimum((uniform * count.astype(jnp.float32)).astype(jnp.int32), count - 1)
    return groups.token_groups[groups.token_start[tokens] + nth]


def swap(key: KeyLike, groups: Groups, tokens: Int[Array, "*N"]) -> Int[Array, "*N"]:
    """Replaces each token by a random member of a random one of its groups: the test of PCG's Table 2.

    Token t becomes t' with probability sum over k in S(t) and S(t') of 1 / (|S(t)| |G_k|).

    Args:
        key: consumed; of any implementation, see ``jaxspec.keys.threefry_key``.
        groups: of a vocabulary of V tokens.
        tokens: int32 [...], 0 .. V-1.

    Returns:
        int32 [...].
    """
    which, member = jax.random.uniform(threefry_key(key), (2, *tokens.shape), jnp.float32)
    group = pick_group(which, groups, tokens)
    size = groups.sizes[group]
    nth = jnp.minimum((member * size.astype(jnp.float32)).astype(jnp.int32), size - 1)
    return groups.members[group, nth]
