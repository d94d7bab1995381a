"""Front-ends of other packages, loaded without what they import and do not need here."""

import functools
import importlib.util
import sys
import types
from unittest import mock

import pytest


@functools.cache
def s3tokenizer_utils():
    """The module s3tokenizer.utils, or a skip. Its stubs are gone afterwards."""
    if (found := importlib.util.find_spec("s3tokenizer")) is None:
        pytest.skip("s3tokenizer not installed: pip install --no-deps s3tokenizer==0.3.0")
    path = f"{found.submodule_search_locations[0]}/utils.py"
    spec = importlib.util.spec_from_file_location("s3tokenizer_utils_alone", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name: types.ModuleType(name) for name in ("torchaudio", "onnx")}):
        spec.loader.exec_module(module)
    return module
