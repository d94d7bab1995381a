"""Files as torch writes them, and their numbers to compare with."""

import numpy as np
import torch


def numbers(shape, dtype="float32"):
    """A tensor of random bits."""
    dtype = getattr(torch, dtype)
    if dtype == torch.bool or 0 in shape:
        return (torch.arange(int(np.prod(shape))) % 3 == 0).to(dtype).reshape(shape)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, count, np.uint8)).view(dtype).reshape(shape)


def same(ours, theirs):
    """Equal shape and dtype, and equal in every bit."""
    name = str(theirs.dtype).removeprefix("torch.")
    bits = theirs.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return ours.shape == tuple(theirs.shape) and ours.dtype.name == name and ours.tobytes() == bits


def saved(path, value, **how):
    torch.save(value, path, **how)
    return path
