"""Settings of the test run: quick compilation, shapes of arrays checked at run time, and no implicit rank promotion."""

import gc
import os
import pathlib

# XLA for CPU compiles the loop in a third of the time: without optimisation, and by its older emitters of fused operations.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # programs of an earlier run must not hide what compiles, or how

import jax
import pytest
from jaxtyping import install_import_hook

# The modules whose annotations give the shapes of arrays.
CHECKED = ("sampling", "cache", "groups", "rounds", "speculate", "verify", "draft", "models.transformer", "codec")

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook([f"jaxspec.{name}" for name in CHECKED], "typecheck.checked")

# Memory maps of a process, of which Linux allows 65,530; each compiled program takes some.
_MANY_MAPS, _MOST_MAPS = 25_000, 45_000  # after a module, and after any test


def _forget_programs_above(limit):
    """Drops compiled programs before there are too many for the process: XLA crashes then."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > limit:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _not_too_many_programs():
    yield
    _forget_programs_above(_MOST_MAPS)


@pytest.fixture(autouse=True, scope="module")
def _few_programs_between_modules():
    """Not within a module, as some count compilations."""
    yield
    _forget_programs_above(_MANY_MAPS)
