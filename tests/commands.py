"""Runs the command line in the tests' own process."""

import contextlib
import io
import sys
from unittest import mock

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxspec.commands import main as cli


def run(*argv):
    """Runs ``jaxspec ARGV``; returns (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", ["jaxspec", *map(str, argv)]),
        mock.patch("sys.unraisablehook", sys.unraisablehook),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        folder = jax.config.jax_compilation_cache_dir
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:  # programs that tests compile by themselves are not written to the cache
            jax.config.update("jax_compilation_cache_dir", folder)
            compilation_cache.reset_cache()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Keeps compiled programs for the tests of this run only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
