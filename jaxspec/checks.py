"""Checks that target, draft and verifier keep their contracts (``jaxspec.types``): shapes, when the loop is traced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.types import Array, Cache, LanguageModel, Params, Proposal, Verdict


def check_mesh(params: Params) -> None:
    """Refuses meshes with Explicit axes, which ``jax.make_mesh`` makes by default."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [
        leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)
    ]
    if any(jax.sharding.AxisType.Explicit in mesh.axis_types for mesh in meshes):
        raise ValueError("expected a mesh with Auto axes, got Explicit ones: make it with jaxspec.mesh.make(data=..., model=...)")


def vocab_size(target: LanguageModel, params: Params) -> int:
    """V of a model that does not state it, found by tracing ``apply``; cached."""
    leaves, tree = jax.tree.flatten(params)
    return _vocab_size(target, tree, tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))


@functools.lru_cache
def _vocab_size(target: LanguageModel, tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    ids, length = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = jax.eval_shape(lambda: target.init_cache(1, 2))
    return jax.eval_shape(target.apply, tree.unflatten(leaves), ids, cache, length)[0].shape[-1]


def check_cache(target: LanguageModel, cache: Cache, batch: int, cells: int) -> None:
    """Refuses a cache that the loop would write past the end of; its arrays must follow ``cells``."""
    leaves, longer = (
        [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
        for tree in (cache, jax.eval_shape(lambda: target.init_cache(batch, cells + 1)))
    )
    sizes = [a for one, more in zip(leaves, longer, strict=True) for a, b in zip(one.shape, more.shape, strict=True) if a != b]
    fits = all(leaf.ndim and leaf.shape[0] == batch for leaf in leaves) and all(size >= cells for size in sizes)
    if leaves and not (fits and sizes):
        raise ValueError(
            f"expected init_cache({batch}, {cells}) to give arrays [{batch}, ...] with room for {cells} positions, got shapes "
            f"{[leaf.shape for leaf in leaves]}: size them by both arguments"
        )


def check_scores(scores: Any, cache: Cache, vocab: int | None, batch: int, block: int) -> tuple[Array | None, Cache]:
    """The features and the cache that ``apply`` returned, its results having been checked against the contract."""
    if not (isinstance(scores, tuple) and len(scores) == 3):
        raise ValueError(f"expected apply to return (logits, features, cache), got {_shapes(scores)}")
    logits, features, new_cache = scores
    expected = f"logits [{batch}, {block}, {vocab or 'V'}], features [{batch}, {block}, F] or None, and the cache as it was"
    fits = logits.ndim == 3 and logits.shape[:2] == (batch, block) and logits.shape[2] == (vocab or logits.shape[2])
    fits = fits and (features is None or (features.ndim == 3 and features.shape[:2] == (batch, block)))
    if not fits or _shapes(new_cache) != _shapes(cache):
        raise ValueError(f"expected apply to return {expected}, got {_shapes(scores)}")
    return features, new_cache


def check_proposal(proposal: Proposal, draft_length: int, target_probs: Array) -> None:
    """Refuses a proposal of other shapes than the target's distributions."""
    batch, _, vocab = target_probs.shape
    expected = (batch, draft_length), (batch, draft_length, vocab)
    got = proposal.tokens.shape, proposal.probs.shape
    if got != expected:
        raise ValueError(
            f"expected the draft to propose tokens and probs of shapes {expected}, as the target has them, got {got}"
        )


def check_verdict(verdict: Verdict, proposal: Proposal, vocab: int) -> tuple[Verdict, Array]:
    """The verdicts within their bounds, and for which rows proposal and verdict were: bool [B]."""
    batch, K = proposal.tokens.shape
    fields = (verdict.num_accepted, verdict.token, verdict.num_accepted if verdict.num_exact is None else verdict.num_exact)
    if any(field.shape != (batch,) or not jnp.issubdtype(field.dtype, jnp.integer) for field in fields):
        raise ValueError(f"expected a verifier to return its counts and its token as integers [], got {_shapes(verdict)}")
    ids = jnp.concatenate([proposal.tokens, verdict.token[:, None]], axis=1)
    valid = (verdict.num_accepted >= 0) & (verdict.num_accepted <= K) & ((ids >= 0) & (ids < vocab)).all(1)
    return Verdict(*(jnp.where(valid, field, 0).astype(jnp.int32) for field in fields)), valid


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)
