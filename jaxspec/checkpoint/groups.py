"""Acoustic similarity groups as a file (.npz)."""

import os

import numpy as np

from jaxspec.common.files import replacing
from jaxspec.groups import Groups, tabulate


def save(path: str | os.PathLike, groups: Groups) -> None:
    """Writes groups as .npz; a file of that name is replaced at once or, on an error, left as it was."""
    vocab, sizes, members = len(groups.token_start), np.asarray(groups.sizes), np.asarray(groups.members)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, vocab=vocab, sizes=sizes, tokens=members[members < vocab])


def load(path: str | os.PathLike) -> Groups:
    """Reads what ``save`` wrote.

    Raises:
        ValueError: the file is damaged, or holds no groups.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            vocab, sizes, tokens = int(file["vocab"]), file["sizes"], file["tokens"]
    except OSError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in the readers of zip, deflate and npy
        raise ValueError(f"{path} is not a file of groups, or is damaged ({error}): save the groups again") from error
    whole = sizes.ndim == tokens.ndim == 1 and sizes.dtype == tokens.dtype == np.int32 and tokens.size > 0
    whole = whole and sizes.min() > 0 and sizes.sum() == tokens.size and set(np.unique(tokens)) == set(range(vocab))
    if not whole:
        raise ValueError(f"{path} does not hold groups of a whole vocabulary: save the groups again")
    return tabulate(np.split(tokens, np.cumsum(sizes)[:-1]), vocab)
