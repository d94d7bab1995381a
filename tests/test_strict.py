"""The library under JAX's strictest settings, all at once: what it emits is what it emits without them."""

import json
import os
import pathlib
import subprocess
import sys

import strict_program

STRICT = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
}


def test_every_strict_setting_at_once_changes_no_token():
    """x64, no rank promotion, strict types, no implicit transfers, rbg keys by default, and warnings as errors."""
    program = str(pathlib.Path(strict_program.__file__))
    environment = os.environ | STRICT | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-W", "error", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == strict_program.tokens()
