"""Programs on disk, so that another process neither compiles nor traces them again.

JAX's persistent cache keeps compiled programs, but every process still has to trace and lower a program to find it there, which
takes seconds for a loop around two models. ``call`` also keeps the traced program (``jax.export``), under a digest of its inputs.
"""

import functools
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.core

from jaxspec import mesh
from jaxspec.common.files import replacing

T = TypeVar("T")

_DIGEST = hashlib.sha256
_DIGEST_BYTES = 32
_descriptions: dict[Hashable, str] = {}
_programs: dict[str, Callable[..., Any]] = {}


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs on disk, so that the next process starts faster; the command line does so by itself.

    Args:
        folder: where; by default JAX's own choice (``JAX_COMPILATION_CACHE_DIR``), else the folder ``jaxspec`` in the user's
            cache (``XDG_CACHE_HOME``, by default ``~/.cache``). It may be deleted at any time.

    Returns:
        The folder.
    """
    chosen = Path(folder or _option("jax_compilation_cache_dir") or user_cache())
    if _option("jax_compilation_cache_dir") != str(chosen):
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", str(chosen))
        compilation_cache.reset_cache()  # JAX looks for a folder once, at its first compilation
    for name, value in (("jax_persistent_cache_min_compile_time_secs", 0.0), ("jax_persistent_cache_min_entry_size_bytes", -1)):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return chosen


def _option(name: str) -> Any:
    return getattr(jax.config, name)


def user_cache() -> Path:
    """The folder of jaxspec in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxspec"


def cache_folder(name: str) -> Path | None:
    """A folder for derived data beside the compiled programs; None where no cache is in use."""
    chosen = _option("jax_compilation_cache_dir")
    return Path(chosen) / f"jaxspec-{name}" if chosen else None


def describe(value: T, description: str) -> T:
    """Registers what a function (or a tuple of functions) computes, for ``call``; returns the value.

    Values with equal descriptions must compute the same from the same arguments. Of a ``jax.tree_util.Partial`` the function is
    registered, as its arrays are arguments.
    """
    _descriptions[value.func if isinstance(value, jax.tree_util.Partial) else value] = description
    return value


def keep(function: Callable[..., T], description: str) -> Callable[..., T]:
    """A jitted function without static arguments, through ``call``."""
    return functools.partial(call, describe(function, description), ())


def description_of(value: Hashable) -> str | None:
    """What ``describe`` was given for a value; None where nothing."""
    return _descriptions.get(value)


def call(function: Callable[..., Any], static: Sequence[Hashable], *arguments: Any) -> Any:
    """``function(*static, *arguments)``, from a traced program on disk where there is one.

    Args:
        function: jitted, its first arguments static; it must have been given to ``describe``, or nothing is kept.
        static: None, numbers, strings, tuples of them, and values that were given to ``describe``.
        arguments: pytrees of arrays on one device; functions in a ``jax.tree_util.Partial`` must have been given to ``describe``.
    """
    leaves, structure = jax.tree.flatten(arguments)
    key = _key([function, *static, *_partials(arguments)], leaves, str(structure))
    if key is None:
        return function(*static, *arguments)
    if key not in _programs:
        program = _program(key, lambda *arrays: function(*static, *jax.tree.unflatten(structure, arrays)), leaves)
        _programs[key] = jax.jit(program)
    return _programs[key](*leaves)


def updating(function: Callable[..., T], static: Sequence[Hashable], state: T, *arguments: Any) -> Callable[..., T]:
    """What ``call`` is to a function, to one that returns its first argument changed: for many calls, and that one is donated.

    Args:
        function: as for ``call``; it donates its first argument too.
        static: as for ``call``.
        state: the first argument, or one of the same shapes.
        arguments: the others, likewise.

    Returns:
        (state, *arguments) -> the state after ``function``, for arguments of these shapes.
    """
    leaves, structure = jax.tree.flatten((state, *arguments))
    key = _key([function, *static, *_partials(arguments)], leaves, str(structure))
    if key is None:
        return functools.partial(function, *static)
    if key not in _programs:
        # The leaves alone: a state has nodes of types that a file cannot name.
        program = _program(
            key, lambda *arrays: jax.tree.leaves(function(*static, *jax.tree.unflatten(structure, arrays))), leaves
        )
        _programs[key] = jax.jit(program, donate_argnums=range(len(jax.tree.leaves(state))))
    program, of_state = _programs[key], jax.tree.structure(state)
    return lambda *arguments: jax.tree.unflatten(of_state, program(*jax.tree.leaves(arguments)))


def _key(values: Sequence[Hashable], leaves: Sequence[Any], structure: str) -> str | None:
    """A digest of all that a traced program depends on, or None where it is not to be kept."""
    described = [_described(value) for value in values]
    if cache_folder("") is None or None in described or any(map(_is_elsewhere, leaves)) or mesh.current() is not None:
        return None
    shapes = [str(jax.typeof(leaf)) for leaf in leaves]
    structure = re.sub(r" at 0x[0-9a-f]+", "", structure)
    options = [_option(f"jax_{name}") for name in ("enable_x64", "default_matmul_precision", "threefry_partitionable")]
    return _DIGEST(repr([_environment(), options, described, shapes, structure]).encode()).hexdigest()


def _described(value: Hashable) -> str | None:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        parts = [_described(part) for part in value]
        return None if None in parts else repr(parts)
    return repr(value) if value is None or isinstance(value, int | str) else _descriptions.get(value)


def _partials(tree: Any) -> Iterator[Callable[..., Any]]:
    """The functions within a pytree, which are those of its ``jax.tree_util.Partial``."""
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, jax.tree_util.Partial)):
        if isinstance(node, jax.tree_util.Partial):
            yield node.func
            yield from _partials((node.args, node.keywords))


def _is_elsewhere(leaf: Any) -> bool:
    """Whether an array is traced, or lies on several devices."""
    return isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and len(leaf.devices()) > 1)


@functools.cache
def _environment() -> str:
    """Versions, device, and a digest of this package's source."""
    digest = _DIGEST()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{jax.__version__} {importlib.metadata.version('jaxlib')} {jax.devices()[0].device_kind} {digest.hexdigest()}"


def _program(key: str, function: Callable[..., Any], leaves: Sequence[Any]) -> Callable[..., Any]:
    """The program from its file, or traced and written there where that is possible."""
    folder = cache_folder("traced")
    path = folder / key if folder else Path(os.devnull)
    exported = _read(path)
    if exported is None:
        exported = jax.export.export(jax.jit(function))(*leaves)
        _write(path, bytes(exported.serialize()))
    return exported.call


def _read(path: Path) -> jax.export.Exported | None:
    """The program in a file; None where there is none, or a damaged one."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return jax.export.deserialize(bytearray(payload)) if digest == _DIGEST(payload).digest() else None


def _write(path: Path, payload: bytes) -> None:
    """Writes a program with its digest; a folder that cannot be written to is left as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(_DIGEST(payload).digest() + payload)
    except OSError:
        pass
