"""The plan for a TPU: what it refuses, what it finds in programs with known flaws, and the real loop on one topology."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxspec.bench import chips, hlo, plan, presets, roofline
from jaxspec.checkpoint import descriptions, store
from jaxspec.models import card
from jaxspec.sampling import Sampling

V, CACHE = 4096, (1, 512, 8, 128)
MATRICES = {hlo.identity("f32", (V, 128))}
needs_libtpu = pytest.mark.skipif(
    chips.importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install 'jaxspec[tpu-aot]'"
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "smal"}, "expected a preset among small, .*, or a folder .*'smal'"),
        ({"topology": "v9:2x2"}, "expected a topology such as v4:2x2x1, .*'v9:2x2'"),
        ({"topology": "v5e:2x"}, "expected a topology such as"),
        ({"batch": 0}, "expected batch of 1 or more, got 0"),
        ({"cells": 260}, "expected at least 261 cells, for a prompt of 256"),
        ({"draft": "13"}, "expected 1 to 12 of the target's layers, got 13"),
        ({"batch": 5000}, r"a batch of at most 565 .*target 202.2 MB \+ draft 76.29 MB .* = 147.1 GB, but it has 16.91 GB"),
        ({"model": "llasa-8b"}, r"expected a smaller model, or fewer cells .*target 16.08 GB"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(changes, said, monkeypatch):
    monkeypatch.setattr(plan, "_compile", lambda lowered: pytest.fail("compiled"))
    monkeypatch.setattr(chips, "devices", lambda topology: pytest.fail("asked for the chip"))
    with pytest.raises(ValueError, match=said):
        plan.plan(plan.Settings(**{"model": "small", "topology": "v5e:2x2"} | changes))


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"libtpu, which is not installed: pip install 'jaxspec\[tpu-aot\]'"):
        plan.plan(plan.Settings("small", "v5e:2x2"))


def test_the_command_ends_with_2_on_bad_input():
    arguments = ["plan", "--model", "small", "--topology", "v5e:2x2", "--batch", "5000"]
    done = subprocess.run([sys.executable, "-m", "jaxspec.commands.main", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("jaxspec: expected a batch of at most 565")


def test_a_converted_folder_gives_the_shape(tmp_path):
    shape = presets.pair("small", "float32").target
    model = card.Model("llasa", shape, 0, shape.vocab - 1, (shape.vocab - 1,), 0, (), Sampling(), "", "")
    store.write_description(tmp_path, descriptions.to_json(model))
    pair = plan.pair_of(plan.Settings(str(tmp_path), "v5e:2x2", draft="2"))
    assert pair == presets.pair("small", "bfloat16")
    assert plan.pair_of(plan.Settings("small", "v5e:2x2", draft=str(tmp_path))).draft == pair.target
    with pytest.raises(ValueError, match="expected a draft of the target's 65537 ids"):
        plan.pair_of(plan.Settings("llasa-1b", "v5e:2x2", draft=str(tmp_path)))
    with pytest.raises(ValueError, match="expected --draft with a folder"):
        plan.pair_of(plan.Settings(str(tmp_path), "v5e:2x2"))


def put(cache, i, law):
    return jax.lax.dynamic_update_slice(cache, law[:1024].reshape(1, 1, 8, 128).astype(cache.dtype), (0, i, 0, 0))


def sound(i, cache, law):
    cache = put(cache, i, law)
    return cache, law * cache.astype(jnp.float32).sum()


def keeps_the_old_cache(i, caches, law):
    return (put(caches[0], i, law), caches[0]), law * 2


def makes_the_cache_anew(i, cache, law):
    return cache[:, ::-1] * 2, law * 2


def scatters_into_the_cache(i, cache, law):
    place = (law[:4] * 512).astype(jnp.int32)
    return cache.at[0, place].set(law[:1024].reshape(8, 128).astype(cache.dtype)), law * 2


def sorts_the_vocabulary(i, cache, law):
    return put(cache, i, law), jnp.sort(law)


def gathers_the_vocabulary(i, cache, law):
    return put(cache, i, law), law[(law * V).astype(jnp.int32)]


def multiplies_term_by_term(i, cache, law):
    cache = put(cache, i, law)
    return cache, law * (law.astype(cache.dtype) @ cache.reshape(V, 128)).sum()


def tells_the_host(i, cache, law):
    jax.debug.callback(lambda first: None, law[0])
    return put(cache, i, law), law * 2


def compiled(function, *shapes):
    sharding = jax.sharding.SingleDeviceSharding(chips.devices("v5e:2x2")[0])
    return hlo.parse(jax.jit(function).lower(*plan._placed(shapes, sharding)).compile().as_text())


@needs_libtpu
@pytest.mark.parametrize(
    ("turn", "broken"),
    [
        (sound, None),
        (keeps_the_old_cache, "caches"),
        (makes_the_cache_anew, "caches"),
        (scatters_into_the_cache, "caches"),
        (multiplies_term_by_term, "matrices"),
        (sorts_the_vocabulary, "vocabulary"),
        (gathers_the_vocabulary, "vocabulary"),
        (tells_the_host, "host"),
    ],
)
def test_a_flaw_of_the_loop_is_found_and_named(turn, broken):
    def loop(cache, law):
        return jax.lax.while_loop(lambda s: s[2][0] < s[0], lambda s: (s[0] + 1, *turn(*s)), (jnp.int32(0), cache, law))

    cache = jax.ShapeDtypeStruct(CACHE, jnp.bfloat16)
    program = compiled(loop, (cache, cache) if turn is keeps_the_old_cache else cache, jax.ShapeDtypeStruct((V,), jnp.float32))
    made = hlo.checks(program, 1, V, {hlo.identity("bf16", CACHE)}, MATRICES)
    assert [name for name, check in made.items() if not check["holds"]] == ([broken] if broken else [])
    assert all(check["found"] for check in made.values() if not check["holds"])


def test_a_dynamic_shape_and_a_cache_read_after_it_was_written_are_found():
    text = """
ENTRY %main (p: f32[<=8]) -> f32[<=8] {
  %loop = (f32[<=8]{0}, bf16[1,512,8,128]{3,2,1,0}) while(%p), condition=%ends, body=%turn
}
%turn (q: bf16[1,512,8,128]) -> bf16[1,512,8,128] {
  %old = bf16[1,512,8,128]{3,2,1,0} parameter(0)
  %new = bf16[1,512,8,128]{3,2,1,0} dynamic-update-slice(%old, %block, %i)
  ROOT %sum = bf16[8]{0} fusion(%old, %new), kind=kLoop, calls=%add
}
%add (a: bf16[8]) -> bf16[8] {
  ROOT %a = bf16[8]{0} parameter(0)
}
%ends (q: bf16[8]) -> pred[] {
  ROOT %end = pred[] parameter(0)
}
"""
    made = hlo.checks(hlo.parse(text), 1, V, {hlo.identity("bf16", CACHE)}, MATRICES)
    assert made["caches"]["found"] == ["sum bf16[8]{0}"]
    assert made["shapes"]["found"] == ["loop (f32[<=8]{0}, bf16[1,512,8,128]{3,2,1,0})"]
    assert made["host"]["holds"]
    assert made["vocabulary"]["holds"]


@needs_libtpu
def test_a_loop_of_known_length_costs_its_length():
    def repeat(turns):
        program = compiled(
            lambda x: jax.lax.fori_loop(0, turns, lambda _, x: jnp.tanh(x @ x), x),
            jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),
        )
        return hlo.scheduled_cycles(program, program.entry)

    assert repeat(200) / repeat(100) == pytest.approx(2, rel=0.05)


@needs_libtpu
def test_every_chip_has_a_device_to_compile_for():
    for chip in chips.CHIPS.values():
        assert len(chips.devices(chip.smallest)) == 4 * chip.devices
    with pytest.raises(ValueError, match="expected a layout such as v5e:2x2, got 'v5e:3x3'"):
        chips.devices("v5e:3x3")


@pytest.fixture
def smaller(monkeypatch):
    """The small preset's shapes with fewer layers."""
    shapes = [dataclasses.replace(presets.pair("small", "bfloat16").target, layers=layers) for layers in (3, 1)]
    monkeypatch.setitem(presets.PAIRS, "smaller", lambda: presets.Pair(*shapes, 1))
    return shapes


@needs_libtpu
def test_each_row_of_a_batch_is_written_in_place(smaller):
    result = plan.plan(plan.Settings("smaller", "v5e:2x2", batch=3, cells=512, prompt_length=64))
    assert "in 30 writes" in result["checks"]["caches"]["what"]
    assert all(check["holds"] for check in result["checks"].values()), result["checks"]


@needs_libtpu
def test_the_real_loop_of_a_small_model_on_a_v5e(smaller):
    result = plan.plan(plan.Settings("smaller", "v5e:2x2", cells=512, prompt_length=64))
    memory, turn = result["memory"], result["round"]
    assert json.loads(json.dumps(result)) == result
    assert memory["fits"]
    assert memory["arguments"] == pytest.approx(memory["target"] + memory["draft"] + memory["groups"], rel=0.05)
    assert memory["caches_as_laid_out"] <= memory["temporaries"]
    # Two operations for each parameter and row: four rows of the target, and two of the draft in its first step and the others.
    target, draft = (roofline.model_pass(shape, batch=1, block=1, cells=0).bytes for shape in smaller)
    assert turn["operations"] == pytest.approx(4 * target + 4 * draft, rel=0.2)
    for part in (result["step"], turn):
        assert part["cycles_s"] > part["bandwidth_bound_s"] / 2
    assert turn["cycles"] > result["step"]["cycles"]
    assert f"a round is {turn['cycles'] / result['step']['cycles']:.2f} steps" in plan.card(result)
    # Each layer's keys and values: the target's once, the draft's in its first step and in the others.
    assert "in 10 writes" in result["checks"]["caches"]["what"]
    assert all(check["holds"] for check in result["checks"].values()), result["checks"]
    assert "FAILS" not in plan.card(result)
