"""Traced programs are kept on disk, under keys that hold all they depend on."""

import functools
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxspec.common import compilation_cache
from jaxspec.common.compilation_cache import call, describe, keep, updating, use_compilation_cache


class State(NamedTuple):
    """Of a type that jax.export does not know."""

    sums: Any
    rest: Any


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and no programs in memory."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(compilation_cache, "_programs", {})
    yield use_compilation_cache(tmp_path / "cache")
    use_compilation_cache(before) if before else jax.config.update("jax_compilation_cache_dir", None)


def counted(description):
    """A jitted function, its first argument static, that records each tracing."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def scale(by, x):
        traces.append(x["x"].shape)
        return {"scaled": by * x["x"]}

    return describe(scale, description), traces


def forget(monkeypatch):
    """As in another process: nothing is known but what is on disk."""
    monkeypatch.setattr(compilation_cache, "_programs", {})
    jax.clear_caches()


def test_a_program_is_traced_once_for_all_processes(folder, monkeypatch):
    x = {"x": jnp.arange(3.0)}
    for runs in range(3):
        scale, traces = counted("scale")
        assert call(scale, (2,), x)["scaled"].tolist() == [0, 2, 4]
        assert traces == ([(3,)] if runs == 0 else [])
        forget(monkeypatch)
    assert len(list((folder / "jaxspec-traced").iterdir())) == 1


def test_a_state_is_updated_in_place_by_a_program_that_is_traced_once(folder, monkeypatch):
    for runs in range(2):
        traces = []

        @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
        def add(by, state, more, traces=traces):
            traces.append(by)
            return State(state.sums + by * more, state.rest)

        describe(add, "adds to the sums")
        state, more = State(jnp.arange(3.0), None), jnp.ones(3)
        step = updating(add, (2,), state, more)
        for _ in range(3):
            before, state = state, step(state, more)
            assert before.sums.is_deleted()
        assert isinstance(state, State)
        assert (state.sums.tolist(), state.rest, more.is_deleted()) == ([6, 7, 8], None, False)
        assert traces == ([2] if runs == 0 else [])
        forget(monkeypatch)


def test_a_state_that_is_not_to_be_kept_is_updated_all_the_same(folder):
    add = jax.jit(lambda by, state: State(state.sums + by, None), static_argnums=0, donate_argnums=1)
    state = State(jnp.zeros(2), None)
    assert updating(add, (2,), state)(state).sums.tolist() == [2, 2]
    assert not (folder / "jaxspec-traced").exists()


def test_another_static_value_shape_or_description_is_another_program(folder):
    scale, traces = counted("scale")
    for by, x in ((2, jnp.ones(3)), (3, jnp.ones(3)), (3, jnp.ones(4)), (3, jnp.ones(4, jnp.int32)), (3, jnp.ones(4))):
        assert call(scale, (by,), {"x": x})["scaled"].tolist() == [by] * len(x)
    assert len(traces) == 4
    other, others = counted("another scale")
    call(other, (3,), {"x": jnp.ones(4)})
    assert len(others) == 1


def test_what_is_not_described_is_called_and_not_kept(folder):
    function = jax.jit(lambda x, rule: rule(x))
    inner = jax.tree_util.Partial(jnp.add, 1)
    assert call(function, (), 1, inner) == 2
    assert keep(function, "applies a rule")(1, inner) == 2  # the rule itself is not described
    assert not (folder / "jaxspec-traced").exists()
    describe(jnp.add, "adds")
    assert keep(function, "applies a rule")(1, inner) == 2
    assert (folder / "jaxspec-traced").exists()


def test_a_damaged_file_is_written_again(folder, monkeypatch):
    scale, _ = counted("scale")
    call(scale, (2,), {"x": jnp.ones(2)})
    (path,) = (folder / "jaxspec-traced").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    forget(monkeypatch)
    scale, traces = counted("scale")
    assert call(scale, (2,), {"x": jnp.ones(2)})["scaled"].tolist() == [2, 2]
    assert len(traces) == 1
    assert compilation_cache._read(path) is not None


def test_a_folder_that_cannot_be_written_to_does_not_matter(tmp_path, folder, monkeypatch):
    (folder.parent / "file").write_text("")
    monkeypatch.setattr(compilation_cache, "cache_folder", lambda name: tmp_path / "file" / name)
    scale, _ = counted("scale")
    assert call(scale, (2,), {"x": jnp.ones(2)})["scaled"].tolist() == [2, 2]


def test_keys_and_x64_are_carried(folder):
    draw = keep(jax.jit(jax.vmap(jax.random.uniform)), "draws")
    keys = jax.random.split(jax.random.key(0), 4)
    assert draw(keys).tolist() == jax.vmap(jax.random.uniform)(keys).tolist()


@pytest.mark.parametrize(
    ("variables", "argument", "chosen"),
    [
        ({"XDG_CACHE_HOME": "xdg"}, "", "xdg/jaxspec"),
        ({"XDG_CACHE_HOME": "xdg", "JAX_COMPILATION_CACHE_DIR": "of-jax"}, "", "of-jax"),
        ({"JAX_COMPILATION_CACHE_DIR": "of-jax"}, "'given'", "given"),
        ({"HOME": "home"}, "", "home/.cache/jaxspec"),
    ],
)
def test_the_folder_is_what_is_given_or_jaxs_own_or_the_users(tmp_path, variables, argument, chosen):
    """Also after a first compilation, when JAX has already looked for a folder."""
    code = "import jax, jaxspec; jax.jit(lambda x: x + 1)(1)\n"
    code += f"print(jaxspec.use_compilation_cache({argument})); jax.jit(lambda x: x + 2)(1)"
    clean = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == chosen
    assert any((tmp_path / chosen).iterdir())
