"""The plan for a TPU: what it refuses, what it finds in programs with known flaws, and the real loop on one topology."""

import dataclasses
import json

import commands
import jax
import jax.numpy as jnp
import pytest

from jaxspec.bench import chips, hlo, plan, plan_report, plan_shapes, plan_training, presets, roofline
from jaxspec.bench.plan_shapes import Settings
from jaxspec.bench.plan_training import TrainingSettings
from jaxspec.checkpoint import descriptions, store
from jaxspec.models import card
from jaxspec.models.placement import one_device
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling

V, CACHE = 4096, (1, 512, 8, 128)
MATRICES = {hlo.identity("f32", (V, 128))}
needs_libtpu = pytest.mark.skipif(
    chips.importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install 'jaxspec[tpu-aot]'"
)


@pytest.fixture(autouse=True)
def no_compilation_cache():
    """It cannot read programs that were compiled for another machine."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "smal"}, "expected a preset among small, .*, or a folder .*'smal'"),
        ({"topology": "v9:2x2"}, "expected a topology such as v4:2x2x1, .*'v9:2x2'"),
        ({"topology": "v5e:2x"}, "expected a topology such as"),
        ({"batch": 0}, "expected batch of 1 or more, got 0"),
        ({"cells": 260}, "expected a cache length of at least 261, for a prompt of 256"),
        ({"draft": "13"}, "expected 1 to 12 of the target's layers, got 13"),
        ({"batch": 5000}, r"a batch of at most 565 .*target 202.2 MB \+ draft 76.29 MB .* = 147.1 GB, got 16.91 GB"),
        ({"model": "llasa-8b"}, r"expected a smaller model, or a shorter cache, .*target 16.08 GB"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(changes, said, monkeypatch):
    monkeypatch.setattr(plan, "compile_for_tpu", lambda lowered: pytest.fail("compiled"))
    monkeypatch.setattr(chips, "devices", lambda topology: pytest.fail("asked for the chip"))
    with pytest.raises(ValueError, match=said):
        plan.plan(Settings(**{"model": "small", "topology": "v5e:2x2"} | changes))


def test_without_libtpu_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"libtpu, got none: pip install 'jaxspec\[tpu-aot\]'"):
        plan.plan(Settings("small", "v5e:2x2"))


@pytest.fixture
def no_global_settings():
    """Undoes what the command sets for its process."""
    names = "jax_platforms", "jax_compilation_cache_dir"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def checked(fits=True, **holds):
    """A result of these checks, with made-up figures."""
    figures = {"operations": 1e9, "compute_bound_s": 1e-3, "bytes": 1e6, "optimal_s": 1e-3, "cycles": 10, "cycles_s": None}
    read = {"bytes_needed": 1e6, "bandwidth_bound_s": 1e-3}
    parts = "target draft shared groups target_cache draft_cache arguments outputs code temporaries caches_as_laid_out total room"
    memory = dict.fromkeys([*parts.split(), "parameters_laid_out_anew"], 1000) | {"fits": fits}
    settings = dataclasses.asdict(Settings("small", "v5e:2x2", weights="float")) | {
        "target_layers": 12,
        "draft_layers": None,
        "compile_s": 1.0,
    }
    return settings | {
        "device": "TPU v5 lite",
        "devices": 4,
        "devices_per_chip": 1,
        "memory": memory,
        "prefill": figures,
        "step": figures | read,
        "round": figures | read | {"cycles_of_draft_steps": None},
        "checks": {name: {"holds": held, "what": name, "count": 1, "found": ["an op"]} for name, held in holds.items()},
    }


@pytest.mark.usefixtures("no_global_settings")
@pytest.mark.parametrize(
    ("result", "expected"),
    [(checked(host=True), 0), (checked(host=True, shapes=False), 1), (checked(fits=False, host=True), 1)],
    ids=["holds", "fails", "does not fit"],
)
def test_the_exit_code_tells_whether_the_checks_hold(result, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "plan", lambda settings: seen.append(settings) or result)
    arguments = ["plan", "--model", "small", "--topology", "v5e:2x2", "--cache-length", "512", "--draft", "ngram"]
    code, printed, err = commands.run(*arguments, "--json")
    assert code == expected
    assert json.loads(printed) == result
    assert ("FAILS" in err or "DOES NOT FIT" in err) == bool(expected)
    assert seen[0].cells == 512
    code, printed, err = commands.run(*arguments)
    assert code == expected
    assert printed == plan_report.card(result) + "\n"
    assert not err


@pytest.mark.usefixtures("no_global_settings")
def test_the_command_ends_with_2_on_bad_input():
    code, printed, err = commands.run("plan", "--model", "small", "--topology", "v5e:2x2", "--batch", 5000)
    assert code == 2
    assert not printed
    assert err.startswith("jaxspec: expected a batch of at most 565")


@pytest.mark.usefixtures("no_global_settings")
def test_int8_is_refused_where_nothing_is_decoded():
    code, _, err = commands.run("plan", "--model", "cosyvoice2", "--topology", "v5e:2x2", "--sound", 5, "--weights", "int8")
    assert code == 2
    assert err == "jaxspec: expected no --weights with --train-draft or --sound, got int8: leave it out\n"


def test_a_converted_folder_gives_the_shape(tmp_path):
    shape = presets.pair("small", "float32").target
    model = card.Model("llasa", shape, 0, shape.vocab - 1, (shape.vocab - 1,), 0, (), Sampling(), "", "")
    store.write_description(tmp_path, descriptions.to_json(model))
    pair = plan_shapes.pair_of(Settings(str(tmp_path), "v5e:2x2", draft="2"))
    assert pair == presets.pair("small", "bfloat16")
    assert plan_shapes.pair_of(Settings("small", "v5e:2x2", draft=str(tmp_path))).draft == pair.target
    assert plan_shapes.pair_of(Settings(str(tmp_path), "v5e:2x2", draft="ngram")).draft is None
    int8 = plan_shapes.pair_of(Settings(str(tmp_path), "v5e:2x2", draft="2", weights="int8"))
    assert (int8.target.weights, int8.draft.weights) == ("int8", "int8")
    with pytest.raises(ValueError, match="expected a draft of the target's 65537 ids"):
        plan_shapes.pair_of(Settings("llasa-1b", "v5e:2x2", draft=str(tmp_path)))
    with pytest.raises(ValueError, match=r"expected --draft with .*, got none: give ngram, a folder, or a number"):
        plan_shapes.pair_of(Settings(str(tmp_path), "v5e:2x2"))


def put(cache, i, probs):
    return jax.lax.dynamic_update_slice(cache, probs[:1024].reshape(1, 1, 8, 128).astype(cache.dtype), (0, i, 0, 0))


def writes_in_place(i, cache, probs):
    cache = put(cache, i, probs)
    return cache, probs * cache.astype(jnp.float32).sum()


def keeps_the_old_cache(i, caches, probs):
    return (put(caches[0], i, probs), caches[0]), probs * 2


def makes_the_cache_anew(i, cache, probs):
    return cache[:, ::-1] * 2, probs * 2


def scatters_into_the_cache(i, cache, probs):
    place = (probs[:4] * 512).astype(jnp.int32)
    return cache.at[0, place].set(probs[:1024].reshape(8, 128).astype(cache.dtype)), probs * 2


def sorts_the_vocabulary(i, cache, probs):
    return put(cache, i, probs), jnp.sort(probs)


def gathers_the_vocabulary(i, cache, probs):
    return put(cache, i, probs), probs[(probs * V).astype(jnp.int32)]


def multiplies_term_by_term(i, cache, probs):
    cache = put(cache, i, probs)
    return cache, probs * (probs.astype(cache.dtype) @ cache.reshape(V, 128)).sum()


def tells_the_host(i, cache, probs):
    jax.debug.callback(lambda first: None, probs[0])
    return put(cache, i, probs), probs * 2


def compiled(function, *shapes):
    device = one_device(chips.devices("v5e:2x2")[0])
    on_chip = plan_shapes.placed(shapes, jax.tree.map(lambda leaf: device.sharding(), shapes))
    return hlo.parse(jax.jit(function).lower(*on_chip).compile().as_text())


@needs_libtpu
@pytest.mark.parametrize(
    ("body", "broken"),
    [
        (writes_in_place, None),
        (keeps_the_old_cache, "caches"),
        (makes_the_cache_anew, "caches"),
        (scatters_into_the_cache, "caches"),
        (multiplies_term_by_term, "matrices"),
        (sorts_the_vocabulary, "vocabulary"),
        (gathers_the_vocabulary, "vocabulary"),
        (tells_the_host, "host"),
    ],
)
def test_a_flaw_of_the_loop_is_found_and_named(body, broken):
    def loop(cache, probs):
        return jax.lax.while_loop(lambda s: s[2][0] < s[0], lambda s: (s[0] + 1, *body(*s)), (jnp.int32(0), cache, probs))

    cache = jax.ShapeDtypeStruct(CACHE, jnp.bfloat16)
    program = compiled(loop, (cache, cache) if body is keeps_the_old_cache else cache, jax.ShapeDtypeStruct((V,), jnp.float32))
    made = hlo.checks(program, 1, V, {hlo.identity("bf16", CACHE)}, MATRICES)
    assert [name for name, check in made.items() if not check["holds"]] == ([broken] if broken else [])
    assert all(check["found"] for check in made.values() if not check["holds"])


def test_a_dynamic_shape_and_a_cache_read_after_it_was_written_are_found():
    text = """
ENTRY %main (p: f32[<=8]) -> f32[<=8] {
  %loop = (f32[<=8]{0}, bf16[1,512,8,128]{3,2,1,0}) while(%p), condition=%ends, body=%body
}
%body (q: bf16[1,512,8,128]) -> bf16[1,512,8,128] {
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


INT8_LOOP = """
ENTRY %main (p: s8[4096,128]) -> bf16[2,128] {{
  %loop = (s8[4096,128]{{1,0}}, {carried}bf16[2,128]{{1,0}}) while(%p), condition=%ends, body=%body
}}
%body (q: s8[4096,128]) -> bf16[2,128] {{
  %w = s8[4096,128]{{1,0}} parameter(0)
  {made}
  ROOT %y = bf16[2,128]{{1,0}} fusion(%w, %x), kind=kOutput, calls=%product
}}
%product (a: s8[4096,128]) -> bf16[2,128] {{
  %a = s8[4096,128]{{1,0}} parameter(0)
  %as_float = bf16[4096,128]{{1,0}} convert(%a)
  ROOT %dot = bf16[2,128]{{1,0}} convolution(%x, %as_float)
}}
%ends (q: bf16[8]) -> pred[] {{
  ROOT %end = pred[] parameter(0)
}}
"""


@pytest.mark.parametrize(
    ("carried", "made", "found"),
    [
        ("", "", []),  # a conversion within the product's fusion stays in registers
        ("", "%kept = bf16[4096,128]{1,0} convert(%w)", ["kept bf16[4096,128]{1,0}"]),
        ("bf16[4096,128]{1,0}, ", "", ["loop (s8[4096,128]{1,0}, bf16[4096,128]{1,0}, bf16[2,128]{1,0})"]),
    ],
    ids=["fused", "in the loop", "before the loop"],
)
def test_int8_weights_that_are_kept_as_floats_are_found(carried, made, found):
    program = hlo.parse(INT8_LOOP.format(carried=carried, made=made))
    check = hlo.checks(program, 1, V, set(), set(), int8_as_floats={hlo.identity("bf16", (4096, 128))})["int8"]
    assert (check["holds"], check["found"]) == (not found, found)


@needs_libtpu
def test_a_loop_of_known_length_costs_its_length():
    def repeat(times):
        program = compiled(
            lambda x: jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(x @ x), x),
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
@pytest.mark.slow
def test_int8_weights_are_read_as_they_are(smaller):
    settings = Settings("smaller", "v5e:2x2", cells=512, prompt_length=64)
    floats, int8 = plan.plan(settings), plan.plan(dataclasses.replace(settings, weights="int8"))
    assert int8["memory"]["arguments"] < 0.55 * floats["memory"]["arguments"]
    assert int8["memory"]["temporaries"] < 1.1 * floats["memory"]["temporaries"]
    assert int8["step"]["bytes_needed"] < 0.55 * floats["step"]["bytes_needed"]
    assert int8["step"]["cycles"] < floats["step"]["cycles"]
    assert plan_report.passes(int8), int8["checks"]
    assert "in bfloat16 with int8 weights" in plan_report.card(int8)


@needs_libtpu
@pytest.mark.slow
def test_each_row_of_a_batch_is_written_in_place(smaller):
    result = plan.plan(Settings("smaller", "v5e:2x2", batch=3, cells=512, prompt_length=64))
    assert "in 30 writes" in result["checks"]["caches"]["what"]
    assert all(check["holds"] for check in result["checks"].values()), result["checks"]


@needs_libtpu
def test_the_real_loop_of_a_small_model_on_a_v5e(smaller):
    result = plan.plan(Settings("smaller", "v5e:2x2", cells=512, prompt_length=64))
    memory, figures = result["memory"], result["round"]
    assert json.loads(json.dumps(result)) == result
    assert memory["fits"]
    caches = memory["target_cache"] + memory["draft_cache"]
    assert memory["arguments"] == pytest.approx(memory["target"] + memory["draft"] + memory["groups"] + caches, rel=0.05)
    parts = sum(memory[name] for name in ("arguments", "temporaries", "outputs", "code"))
    assert memory["total"] < parts - caches  # they are donated
    assert memory["parameters_laid_out_anew"] == 0
    # Two operations for each parameter and row: four rows of the target, and two of the draft in its first step and the others.
    target, draft = (roofline.model_pass(shape, batch=1, block=1, cells=0).bytes for shape in smaller)
    assert figures["operations"] == pytest.approx(4 * target + 4 * draft, rel=0.2)
    for part in (result["step"], figures):
        assert part["cycles_s"] > part["bandwidth_bound_s"] / 2
    assert figures["cycles"] > result["step"]["cycles"]
    assert f"a round is {figures['cycles'] / result['step']['cycles']:.2f} plain steps" in plan_report.card(result)
    # Each layer's keys and values: the target's once, the draft's in its first step and in the others.
    assert "in 10 writes" in result["checks"]["caches"]["what"]
    assert all(check["holds"] for check in result["checks"].values()), result["checks"]
    assert "FAILS" not in plan_report.card(result)


@pytest.fixture
def toy(monkeypatch):
    """A model whose vocabulary is as small as the look-ups of the verifier's groups."""
    target = Config((300, 8), 300, 64, 2, 4, 2, 16, 128)
    monkeypatch.setitem(presets.PAIRS, "toy", lambda: presets.Pair(target, dataclasses.replace(target, layers=1), 1))


@needs_libtpu
@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("draft", "writes"), [("1", 8), ("ngram", 4)])
def test_float32_caches_and_lookups_of_groups_in_a_toy_are_no_flaws(draft, writes):
    """XLA keeps the float32 caches as bfloat16, in which a TPU multiplies; and [3, 140] is more than 300, but no gather of V."""
    result = plan.plan(Settings("toy", "v5e:2x2", draft=draft, cells=256, prompt_length=32, dtype="float32"))
    assert f"in {writes} writes" in result["checks"]["caches"]["what"]
    assert result["memory"]["caches_as_laid_out"] >= 0
    assert plan_report.passes(result), result["checks"]
    assert ("n-gram draft" in plan_report.card(result)) == (draft == "ngram")


@needs_libtpu
@pytest.mark.parametrize("recipe", [pytest.param("recurrent", marks=pytest.mark.slow), "group"])
def test_a_step_of_training_is_divided_over_the_chips(recipe, monkeypatch):
    target = Config((300, 8), 300, 256, 4, 4, 2, 64, 512)
    monkeypatch.setitem(presets.PAIRS, "toy", lambda: presets.Pair(target, None, 1))
    four = plan_training.plan(TrainingSettings("toy", "v5e:2x2", recipe, 64))
    assert json.loads(json.dumps(four)) == four
    assert four["target_parameters"] > 4 * 256 * 512 * 3
    # Whole, they are the target in bfloat16, and weights, average and two moments in float32.
    whole = 2 * four["target_parameters"] + 16 * four["trained_parameters"]
    assert four["memory"]["arguments"] < whole / 2
    assert four["collectives"]["all-gather"] > 0
    assert four["memory"]["fits"]
    assert "on 4 devices of v5e:2x2" in plan_training.card(four)


@needs_libtpu
def test_rows_that_the_chips_do_not_divide_are_refused():
    said = "expected rows that 16 devices times 1 parts divide, got 8: change rows or accumulate in the recipe"
    with pytest.raises(ValueError, match=said):
        plan_training.plan(TrainingSettings("small", "v5e:4x4", "pcg"))
