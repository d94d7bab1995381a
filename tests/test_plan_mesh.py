"""Plans for meshes: collectives read from programs, the real loop on four chips, and the sweep."""

import dataclasses
import json
import types

import commands
import jax
import pytest

from jaxspec.bench import chips, collectives, hlo, plan, plan_report, plan_shapes, plan_sweep, presets, roofline
from jaxspec.bench.plan_shapes import Settings
from jaxspec.models.transformer import Config

needs_libtpu = pytest.mark.skipif(
    chips.importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install 'jaxspec[tpu-aot]'"
)

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %a = f32[] parameter(0)
}
%wrapped (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %scattered = f32[4]{0} reduce-scatter(%p), to_apply=%add
}
%thrice (s: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
  %x = bf16[2,64]{1,0} get-tuple-element(%s), index=1
  %sum = bf16[2,64]{1,0} all-reduce(%x), to_apply=%add
}
%until_three (s: (s32[], bf16[2,64])) -> pred[] {
  %s = (s32[], bf16[2,64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}
%thin (s: (pred[], f32[4])) -> (pred[], f32[4]) {
  %y = f32[4]{0} get-tuple-element(%s), index=1
  %kept = f32[4]{0} all-reduce(%y), to_apply=%add
}
%until_kept (s: (pred[], f32[4])) -> pred[] {
  %s = (pred[], f32[4]) parameter(0)
  ROOT %kept = pred[] get-tuple-element(%s), index=0
}
%dear (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%add, backend_config={"estimated_cycles":"9"}
}
%cheap (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}
%body (q: (f32[8], bf16[2,64])) -> (f32[8], bf16[2,64]) {
  %y = f32[8]{0} get-tuple-element(%q), index=0
  %begun = (f32[8]{0}, f32[32]{0}) all-gather-start(%y), dimensions={0}
  %whole = f32[32]{0} all-gather-done(%begun)
  %sent = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  %got = f32[8]{0} collective-permute-done(%sent)
  %half = ((f32[8]{0}), f32[4]{0}) async-start(%y), calls=%wrapped
  %done = f32[4]{0} async-done(%half), calls=%wrapped
  %steps = (s32[], bf16[2,64]) while(%q), condition=%until_three, body=%thrice
  %tries = (pred[], f32[4]) while(%q), condition=%until_kept, body=%thin
  %filtered = f32[8]{0} conditional(%y, %y, %y), branch_computations={%cheap, %dear}
}
%ends (q: (f32[8], bf16[2,64])) -> pred[] {
  ROOT %end = pred[] parameter(0)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (f32[8]{0}, bf16[2,64]{1,0}) while(%p), condition=%ends, body=%body
}
"""


def test_each_collective_is_counted_once_for_each_time_it_runs():
    program = hlo.parse(PROGRAM)
    found = collectives.summary(program, program.body)
    assert found == {
        "always": {
            "all-gather": {"count": 1, "bytes": 128},
            "collective-permute": {"count": 1, "bytes": 32},
            "reduce-scatter": {"count": 1, "bytes": 32},
            "all-reduce": {"count": 3, "bytes": 3 * 256},
        },
        "trip": {"all-reduce": {"count": 1, "bytes": 16}},
        "branch": {"all-reduce": {"count": 1, "bytes": 32}},
    }
    assert collectives.total(found) == {"count": 7, "bytes": 128 + 32 + 32 + 768 + 16}


def test_permutes_and_large_gathers_are_flaws():
    program = hlo.parse(PROGRAM)
    made = collectives.checks(program, large=128)
    assert {name: (check["holds"], check["count"]) for name, check in made.items()} == {
        "permutes": (False, 1),
        "gathers": (False, 1),
    }
    assert collectives.checks(program, large=129)["gathers"]["holds"]
    filtered = hlo.parse(PROGRAM.replace("ROOT %r = f32[8]{0} all-reduce(%p)", "ROOT %r = f32[80]{0} all-gather(%p)"))
    assert collectives.summary(filtered, filtered.body)["branch"] == {"all-gather": {"count": 1, "bytes": 320}}
    assert collectives.checks(filtered, large=129)["gathers"]["holds"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "data=2;model=2"}, "expected a mesh such as data=2,model=4, .*'data=2;model=2'"),
        ({"mesh": "data=2"}, "expected a batch that 2 devices divide, the data axis, got 1"),
        ({"mesh": "model=5"}, "expected heads to be a multiple of 5, the model axis, got 12"),
        ({"mesh": "data=2,model=4", "batch": 2}, "expected a mesh of at most 4 devices, those of v5e:2x2, got data=2,model=4"),
        ({"mesh": "data=4", "batch": 8000}, r"a batch of at most 22\d\d on one device .* caches 2000 x "),
        ({"layers": 13}, "expected 1 to 12 layers, those of the target, got 13"),
        ({"collective_us": -1.0}, "expected collective us of 0 or more, got -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, said, monkeypatch):
    monkeypatch.setattr(plan, "compile_for_tpu", lambda lowered: pytest.fail("compiled"))
    monkeypatch.setattr(chips, "devices", lambda topology: [object()] * 4)
    with pytest.raises(ValueError, match=said):
        plan.plan(Settings(**{"model": "small", "topology": "v5e:2x2"} | changes))


def test_a_device_has_its_part_of_weights_and_caches():
    settings = Settings("llasa-8b", "v5e:2x2", mesh="data=2,model=2", batch=8)
    _, shapes, parts = plan.check_memory(dataclasses.replace(settings, layers=4))
    assert shapes.target_params["head"].shape == (66_048, 4096)  # 65,537 rows, padded to a multiple of 512
    assert plan_shapes.local_shape(shapes.target_params["layer_0"]["attention"]["key"]["kernel"]) == (4096, 512)
    assert parts["target_cache"] == 2 * 4 * (8 // 2) * (8 // 2) * 128 * 2048 * 2


@needs_libtpu
def test_a_mesh_is_chosen_for_the_model_and_the_batch():
    chosen = [plan_shapes.resolved(Settings(model, "v5e:2x2", mesh="auto")).mesh for model in ("llasa-8b", "cosyvoice2")]
    assert chosen == ["data=1,model=4", "data=1,model=2"]
    assert plan_shapes.resolved(Settings("cosyvoice2", "v5e:2x2", mesh="auto", batch=8)).mesh == "data=2,model=2"


@pytest.fixture
def toy(monkeypatch):
    """A model of two layers, whose heads two devices divide."""
    target = Config((700, 8), 700, 128, 2, 4, 2, 64, 256)
    monkeypatch.setitem(presets.PAIRS, "toy", lambda: presets.Pair(target, dataclasses.replace(target, layers=1), 1))


@needs_libtpu
@pytest.mark.usefixtures("toy")
def test_the_real_loop_on_four_chips():
    result = plan.plan(Settings("toy", "v5e:2x2", mesh="data=2,model=2", batch=2, cells=256, prompt_length=32), prefill=False)
    assert json.loads(json.dumps(result)) == result
    assert plan_report.passes(result), result["checks"]
    counted = result["round"]["collectives"]
    # Two for each layer that runs (2 of the target, 1 of the draft three times), and those of embeddings, draws and the verifier.
    assert 10 < counted["always"]["all-reduce"]["count"] < 48
    assert "all-reduce" in counted["trip"]
    assert "collective-permute" not in {kind for kinds in counted.values() for kind in kinds}
    # Its row alone: keys and values of two layers, and of the draft's in its first step and in the others.
    assert "in 8 writes" in result["checks"]["caches"]["what"]
    waits = collectives.total(counted)["count"] * 2e-6
    assert result["round"]["collectives_s"] == pytest.approx(waits)
    assert result["round"]["estimate_s"] > result["round"]["cycles_s"] + waits


def planned(settings, prefill=True):
    """A plan that takes less time on more devices; a batch of 9 fails a check, and 16 rows on a device do not fit."""
    data, model = settings.axes
    counts = {"always": {"all-reduce": {"count": 24, "bytes": 0}}, "trip": {"all-reduce": {"count": 3, "bytes": 0}}, "branch": {}}
    rest = {"cycles_s": 0.0, "cycles": 0, "collectives": counts}
    total = settings.batch // data * 10**9
    return {
        "target_layers": 12,
        "memory": {"total": total, "room": 10**10, "fits": total <= 10**10},
        "compile_s": 1.0,
        "step": {"estimate_s": 4e-3 / model, **rest},
        "round": {"estimate_s": 8e-3 / model, **rest},
        "checks": {"host": {"holds": settings.batch != 9}},
    }


@pytest.fixture
def fake_plans(monkeypatch):
    """Plans on four devices without a compiler."""
    monkeypatch.setattr(plan, "plan", planned)
    monkeypatch.setattr(chips, "devices", lambda topology: [None] * 4)


@pytest.mark.usefixtures("fake_plans")
def test_a_sweep_finds_the_best_mesh_and_batch(tmp_path):
    said = []
    result = plan_sweep.sweep(Settings("small", "v5e:2x2"), [1, 4, 16], 0.75, said.append)
    rows = result["rows"]
    assert [(row["mesh"], row["batch"]) for row in rows[:4]] == [
        ("data=4,model=1", 4),
        ("data=4,model=1", 16),
        ("data=2,model=2", 4),
        ("data=2,model=2", 16),
    ]
    alone = next(row for row in rows if (row["mesh"], row["batch"]) == ("data=1,model=4", 1))
    assert (alone["step_s"], alone["round_s"], alone["all_reduces"], alone["gb"]) == (1e-3, 2e-3, 27, 1.0)
    assert alone["codes_per_s"] == pytest.approx(roofline.expected_tokens(0.75, 3) / 2e-3)
    assert rows[result["least_wait"]]["mesh"] == "data=1,model=4"
    assert (rows[result["most_codes"]]["mesh"], rows[result["most_codes"]]["batch"]) == ("data=2,model=2", 16)
    assert "16.0 GB of 10.0 GB" in next(row["why"] for row in rows if row["mesh"] == "data=1,model=4" and row["batch"] == 16)
    assert len(said) == len(rows)
    plan_sweep.save(tmp_path, result)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    page = (tmp_path / "sweep.md").read_text()
    assert "| does not fit |" in page
    assert page.count("most codes a second") == page.count("least time a code") == 1


def test_a_sweep_tells_what_does_not_fit_from_what_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "compile_for_tpu", lambda lowered: pytest.fail("compiled"))
    monkeypatch.setattr(chips, "devices", lambda topology: [object()] * 4)
    monkeypatch.setattr(plan_sweep, "meshes", lambda settings: ["data=4,model=1", "data=1,model=8"])
    result = plan_sweep.sweep(Settings("small", "v5e:2x2"), [8000], 0.75, lambda line: None)
    large, undivided = result["rows"]
    assert (large["fits"], undivided["fits"]) == (False, True)
    assert (result["most_codes"], result["least_wait"]) == (None, None)
    plan_sweep.save(tmp_path, result)
    page = (tmp_path / "sweep.md").read_text()
    assert "| data=4,model=1 | 8000 |  |  |  |  |  |  |  | does not fit |" in page
    assert "| refused: expected heads to be a multiple of 8, the model axis, got 12" in page
    assert page.count("does not fit") == page.count("refused") == 1


def test_what_the_compiler_finds_too_large_does_not_fit():
    def lowered(said):
        def compiled():
            raise jax.errors.JaxRuntimeError(said)

        return types.SimpleNamespace(compile=compiled)

    with pytest.raises(plan_shapes.DoesNotFitError, match="a program that does not fit, as the compiler finds"):
        plan.compile_for_tpu(lowered("RESOURCE_EXHAUSTED: Ran out of memory"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan.compile_for_tpu(lowered("INTERNAL: a fault"))


@pytest.fixture
def no_global_settings():
    """Undoes what the command sets for its process."""
    names = "jax_platforms", "jax_compilation_cache_dir"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("fake_plans", "no_global_settings")
@pytest.mark.parametrize(("batch", "expected"), [(1, 0), (9, 1)])
def test_the_command_sweeps_into_a_folder(batch, expected, tmp_path):
    arguments = "plan", "--model", "small", "--topology", "v5e:2x2", "--sweep", tmp_path / "s", "--batches", batch, "--json"
    code, printed, err = commands.run(*arguments)
    assert code == expected
    assert json.loads(printed)["rows"][0]["batch"] == batch
    assert "| data=1,model=4 |" in err
    assert (tmp_path / "s" / "sweep.json").exists()
