"""The reference packages of the S3 tokenizers, of CAM++ and of ONNX files; a test skips where they are not installed."""

import contextlib
import importlib
import sys
import types
import warnings

import numpy as np
import pytest
import torch


@contextlib.contextmanager
def stubbed(*names):
    """Empty modules of these names, where there are none, for as long as a package is imported."""
    missing = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    sys.modules |= {name: types.ModuleType(name) for name in missing}
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def package(name):
    """A module, or a skipped test where it is not installed."""
    with warnings.catch_warnings(), stubbed("torchaudio"):
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)
