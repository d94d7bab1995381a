"""Acoustic similarity groups as a file (.npz)."""

import os

import numpy as np

from jaxspec.common.files import replacing
from jaxspec.groups import Groups, tabulate


def save(path: str | os.PathLike[str], groups: Groups) -> None:
    """Writes groups as .npz, atomically: on an error, an existing file of that name is unchanged.

    Args:
        path: the file.
        groups: of any vocabulary.

    Raises:
        OSError: the file cannot be written.
    """
    vocab, sizes, members = len(groups.token_start), np.asarray(groups.sizes), np.asarray(groups.members)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, vocab=vocab, sizes=sizes, tokens=members[members < vocab])


def load(path: str | os.PathLike[str]) -> Groups:
    """Reads what ``save`` wrote.

    Args:
        path: the file.

    Returns:
        The groups, on the default device.

    Raises:
        ValueError: the file is damaged, or holds no groups.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            vocab, sizes, tokens = int(file["vocab"]), file["sizes"], file["tokens"]
    except OSError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in the readers of zip, deflate and npy
        raise ValueError(f"expected a file of groups, got {path}, which is damaged ({error}): save the groups again") from error
    if not _is_whole(vocab, sizes, tokens):
        raise ValueError(f"expected groups of a whole vocabulary, got {path} without them: save the groups again")
    return tabulate(np.split(tokens, np.cumsum(sizes)[:-1]), vocab)


def _is_whole(vocab: int, sizes: np.ndarray, tokens: np.ndarray) -> bool:
    """Whether groups of these sizes hold each token of the vocabulary, and each group its tokens in ascending order."""
    if not (sizes.ndim == tokens.ndim == 1 and sizes.dtype == tokens.dtype == np.int32 and tokens.size > 0):
        return False
    if sizes.min(initial=1) < 1 or sizes.sum(dtype=np.int64) != tokens.size:
        return False
    ascending = np.diff(tokens) > 0
    ascending[np.cumsum(sizes)[:-1] - 1] = True
    return bool(ascending.all()) and np.array_equal(np.unique(tokens), np.arange(vocab))
