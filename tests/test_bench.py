"""The benchmark in small: its figures agree with each other, and what the loop costs is counted, not timed."""

import dataclasses
import functools
import io
import json
import types

import checkpoints
import commands
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import mesh, speculate, verify
from jaxspec import request as requests
from jaxspec.bench import cases, chips, loading, measure, picture, plan_shapes, presets, roofline, suite
from jaxspec.bench.cases import Case
from jaxspec.bench.settings import Settings as BenchSettings
from jaxspec.commands.bench import Bench
from jaxspec.common.stopwatch import Stopwatch, compilations
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.models import transformer
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis import builtin
from jaxspec.synthesis.contract import Drafter, Settings
from jaxspec.synthesis.pipeline import speak

TINY = Config((64, 8), 64, 16, 2, 2, 1, 8, 32)


NEEDED = ("--preset", "small", "--synthetic-acceptance", "0.5")
SMALL = (*NEEDED, "--new-tokens", "16", "--repeats", "2", "--prompts", "4")

pytestmark = pytest.mark.usefixtures("own_cache")
own_cache, run = commands.own_cache, commands.run


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A preset that compiles quickly, on a device of known rates."""
    monkeypatch.setitem(presets.PAIRS, "small", lambda: presets.Pair(TINY, TINY, 1))
    monkeypatch.setattr(roofline, "reading", lambda dtype, size: lambda: 1e9)
    monkeypatch.setattr(roofline, "multiplying", lambda dtype: lambda: 1e10)


def test_bench_prints_json_alone_and_writes_table_and_picture(tmp_path):
    out = tmp_path / "bench"
    code, printed, err = run("bench", *SMALL, "--batches", "2", "--auto", "--out-dir", out, "--json")
    assert code == 0, err
    assert "synthetic acceptance" in err
    result = json.loads(printed)
    assert result == json.loads((out / "bench.json").read_text())
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [row["rule"] for row in result["rows"]] == ["autoregressive", "exact", "coarse-grained", "auto"]
    assert result["rows"][3]["chosen"] in ("autoregressive", "exact K=3", "coarse-grained K=3")
    plain = result["rows"][0]
    for row in result["rows"]:
        assert row["compilations_after_warm_up"] == 0
        assert row["codes_per_s_spread"][0] <= row["codes_per_s"] <= row["codes_per_s_spread"][1]
        assert (row["compile_s"] > 0) == (row["rule"] != "auto")  # which has nothing of its own to compile
        assert row["speed_up"] == pytest.approx(row["codes_per_s"] / plain["codes_per_s"])
        assert row["context"] == 4 + 16 / 2
        if row["draft_length"]:
            assert min(row["draft_s"], row["target_s"], row["verify_and_commit_s"], row["prefill_s"]) > 0
            assert 1 <= row["tokens_per_round"] <= 4


def test_bench_without_json_prints_the_table_alone():
    code, printed, err = run("bench", *SMALL, "--verify", "exact")
    assert code == 0, err
    assert "synthetic acceptance" in printed
    assert not any(line.startswith("{") for line in printed.splitlines())
    assert "repeat 2 of 2" in err


def test_bench_takes_the_ngram_draft():
    code, printed, err = run("bench", *SMALL, "--draft", "ngram", "--verify", "exact", "--json")
    assert code == 0, err
    _, row = json.loads(printed)["rows"]
    assert json.loads(printed)["drafts"] == ["ngram"]
    assert row["draft_s"] > 0
    assert "roofline_target" in row
    assert "roofline_draft" not in row


def test_drafts_of_a_converted_model_are_compared_side_by_side(tmp_path):
    target = checkpoints.converted(tmp_path, "llasa")
    folder = checkpoints.converted(tmp_path, "llasa", layers=(0,))
    arguments = ["--preset", target, "--draft", "ngram", folder, "--verify", "exact", "--new-tokens", "8", "--repeats", "1"]
    code, printed, err = run("bench", *arguments, "--draft-lengths", "2", "--out-dir", tmp_path / "out", "--json")
    assert code == 0, err
    plain, *drafted = json.loads(printed)["rows"]
    assert [row["draft"] for row in (plain, *drafted)] == ["", "ngram", str(folder)]
    assert [("roofline_draft" in row) for row in drafted] == [False, True]
    assert "draft_over_step" not in plain
    for row in drafted:
        assert row["prompt"] == 0  # as long as the texts make it
        assert row["context"] > 8
        assert row["draft_over_step"] > 0
        assert row["round_over_step"] == pytest.approx(row["round_s"] / plain["round_s"])
        shares = row["accepted_per_position"]
        assert 1 + sum(shares) >= row["tokens_per_round"] >= 1
        assert 1 >= shares[0] >= shares[1] >= 0
        assert row["acceptance_rate"] >= sum(shares) / 2 - 1e-6  # fewer than K a round are drafted at the end of a row
    table = (tmp_path / "out" / "bench.md").read_text().split("Drafts:")[1]
    assert [line.split("|")[1].strip() for line in table.splitlines() if "| exact |" in line] == ["ngram", str(folder)]


def test_the_plain_loop_computes_no_features():
    """And a loop with a draft computes those that the draft reads, at the same parameters."""
    reads = Drafter(functools.partial(ngram_draft, vocab=64), (), feature_layers=(1,))
    one = dataclasses.replace(models(None, None), drafts={"reads": cases.DraftModel(reads, None)})
    token, length = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)

    def features(draft):
        lm = one.lm(draft)
        return lm.apply(one.target_params, token, lm.init_cache(1, 4), length)[1]

    assert features("") is None
    assert features("reads").shape == (1, 1, TINY.width)


def test_the_built_in_voice_is_benchmarked_with_a_folder(tmp_path):
    folder = folders.voice_draft(tmp_path / "draft")
    loaded = loading.load(BenchSettings(draft=("builtin", str(folder))), "float32").drafts
    own, saved = (jax.tree.leaves(draft.drafter.params) for draft in loaded.values())
    assert list(loaded) == ["builtin", str(folder)]
    assert all((a == b).all() for a, b in zip(own, saved, strict=True))


def models(drafter, acceptance):
    """The tiny target with a draft."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = [presets.random_params(key, TINY) for key in keys]
    requests = cases.random_requests(TINY.vocab - 1, 400, Sampling())
    drafts = {"builtin": cases.DraftModel(Drafter(drafter, params[1]), TINY)}
    groups = presets.neighbours(64, 63, 5)
    return cases.Models("tiny", TINY, params[0], drafts, lambda threshold: groups, requests, acceptance=acceptance)


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("preset", ["llasa-1b", "llasa-3b", "llasa-8b", "cosyvoice2"])
def test_bench_and_plan_choose_the_same_mesh(monkeypatch, preset, weights):
    devices = [types.SimpleNamespace(process_index=0)] * 4
    shown = lambda data, model, devices: types.SimpleNamespace(shape={"data": data, "model": model})  # noqa: E731
    monkeypatch.setattr(mesh, "make", shown)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "set_mesh", lambda made: made)
    monkeypatch.setattr(chips, "devices", lambda topology: devices)
    timed = Bench(preset=preset, dtypes=("bfloat16",), weights=weights, mesh="auto").on_mesh()
    settings = plan_shapes.Settings(preset, "v5e:2x2", "auto", batch=4, weights=weights)
    planned = plan_shapes.resolved(settings).mesh
    assert "data={data},model={model}".format(**timed.shape) == planned
    assert planned == ("data=2,model=2" if preset == "cosyvoice2" else "data=1,model=4")


def test_a_mesh_divides_the_padded_tables_of_a_preset(monkeypatch):
    """Without the mesh, what it divides: 64 ids in 1024 rows."""
    monkeypatch.setattr(mesh, "parts", lambda axis: 4 if axis == "vocab" else 1)
    settings = BenchSettings(preset="small", synthetic_acceptance=0.5, new_tokens=16)
    made = loading.load(settings, "float32")
    assert (made.target.vocab, made.target.padding) == (1024, 960)
    ids = made.requests(Case("autoregressive", 0, 8, 400), 0).prompt
    assert (ids.min(), ids.max()) == (0, 62)
    assert made.groups(0.4).token_start.shape == (1024,)


@pytest.mark.parametrize(
    "drafter",
    [functools.partial(model_draft, transformer.language_model(TINY)), functools.partial(ngram_draft, vocab=64)],
    ids=["model", "ngram"],
)
def test_synthetic_acceptance_is_of_each_position(drafter):
    plain = Case("autoregressive", 0, 8, 4)
    _, row = measure.run(
        models(drafter, 0.7), [plain, Case("coarse-grained", 3, 8, 4, "builtin")], repeats=1, progress=lambda line: None
    )
    # About 1,260 rounds, whose counts of tokens have a deviation of 1.2: the mean is within four standard errors, 6e-5 of alarms.
    assert row["tokens_per_round"] == pytest.approx(roofline.expected_tokens(0.7, 3), abs=0.15)


def test_auto_chooses_among_all_cases_of_its_batch(monkeypatch):
    monkeypatch.setattr(measure, "_Timed", lambda models, case: case)
    cases = [Case("autoregressive", 0, 2, 4), Case("exact", 3, 2, 4, "own"), Case("exact", 3, 8, 4, "own"), Case("auto", 0, 8, 4)]
    assert list(measure._autotuned(None, Case("auto", 0, 2, 4), dict.fromkeys(cases)).candidates) == cases[:2]


def result_of(batches, auto=True):
    """A result with made-up figures: one row for each case of the given batches."""
    rows = []
    for batch in batches:
        for rule, k in (("autoregressive", 0), ("exact", 3), ("coarse-grained", 3), *[("auto", 0)] * auto):
            row = {
                "rule": rule,
                "draft_length": k,
                "draft": "builtin" if k else "",
                "batch": batch,
                "prompt": 64,
                "dtype": "float32",
            }
            row |= {"round_s": 0.01 + 0.01 * k, "codes_per_s": 100.0 * batch + k, "codes_per_s_spread": [90.0, 110.0 * batch]}
            row |= {"tokens_per_round": 1 + k / 2, "speed_up": 1.1}
            if k:
                row |= {"draft_s": 0.01, "target_s": 0.02, "verify_and_commit_s": 0.001, "roofline_target": 0.8}
            elif rule != "auto":
                row |= {"roofline_step": 0.9}
            else:
                row |= {"chosen": "exact K=3"}
            rows.append(row)
    return {"rows": rows}


@pytest.mark.parametrize("batches", [[1], [1, 4, 64]])
def test_no_legend_of_the_picture_covers_its_panel_and_none_is_empty(batches):
    figure = picture.draw(result_of(batches), "title")
    figure.savefig(io.BytesIO(), format="png")  # lays it out
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.patches or len(axes.lines) > 1
        if legend := axes.get_legend():
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        if len(batches) == 1 and not axes.patches:
            assert any(len(line.get_xdata()) > 1 for line in axes.lines)


def test_drafts_that_differ_are_drawn_over_k():
    """Two drafts with two rules at two draft lengths are four lines, and legends hide no panel."""
    result = result_of([1], auto=False)
    plain, *some = result["rows"]
    for row, cost in ((row, cost) for row in some for cost in (0.4, 0.1)):
        result["rows"].append(row | {"draft": f"folder/{cost}", "draft_length": int(10 * cost), "draft_over_step": cost})
    result["rows"] = [plain, *(row for row in result["rows"] if "draft_over_step" in row)]
    result["rows"] += [row | {"draft_length": 7} for row in result["rows"][1:]]
    figure = picture.draw(result, "title")
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes) == 6
    for axes, value in zip(figure.axes[4:], ("tokens_per_round", "draft_over_step"), strict=True):
        drawn = sorted(tuple(line.get_ydata()) for line in axes.lines)
        assert len(drawn) == 4
        assert {y for ys in drawn for y in ys} == {row[value] for row in result["rows"][1:]}
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
        assert {text.get_text().split()[0] for text in axes.get_legend().get_texts()} == {"0.4", "0.1"}


def test_the_rate_of_reading_is_that_of_the_models_size(monkeypatch):
    """What fits in a cache is read faster than memory, so that memory's rate would not bound it."""
    asked = []
    monkeypatch.setattr(roofline, "reading", lambda dtype, size: asked.append((dtype, size)) or (lambda: 1e9 * len(asked)))
    settings = BenchSettings("small", synthetic_acceptance=0.5, verify=("exact",), new_tokens=4, repeats=1, prompts=(4,))
    result = suite.bench(settings, progress=lambda line: None)
    assert asked == [("float32", roofline.model_pass(TINY, 1, 1, 0).bytes)] * 2
    plain, _ = result["rows"]
    assert result["device"]["float32"]["target_bytes_per_s"] == 2e9
    assert plain["roofline_step"] == pytest.approx(
        roofline.model_pass(TINY, 1, 1, plain["context"]).bytes / 2e9 / plain["round_s"]
    )


def test_the_best_of_the_measured_rates_bounds(monkeypatch):
    """And what measures them is compiled before the repeats, in which nothing is."""
    rates = iter([1e9, 1e9, 4e9, 2e9])
    number = jax.jit(lambda x: x + len(TINY.input_tables))
    monkeypatch.setattr(roofline, "multiplying", lambda dtype: lambda: float(number(0)) * 0 + next(rates))
    settings = BenchSettings("small", synthetic_acceptance=0.5, verify=("exact",), new_tokens=4, repeats=3, prompts=(4,))
    result = suite.bench(settings, progress=lambda line: None)
    assert result["device"]["float32"]["flops_per_s"] == 4e9
    assert [row["compilations_after_warm_up"] for row in result["rows"]] == [0, 0]


def test_groups_of_neighbours_have_their_size():
    groups = presets.neighbours(4097, 4096, 140)
    sizes = np.asarray(groups.sizes)
    assert 130 < sizes[sizes > 1].mean() < 150
    assert (np.asarray(groups.token_count)[4096:] == 1).all()


def test_a_pass_reads_the_weights_that_it_multiplies():
    work = roofline.model_pass(TINY, batch=2, block=3, cells=10)
    attention, mlp, norms = 16 * (16 + 8 + 8) + 16 * 16, 3 * 16 * 32, 2 * 16
    weights = 2 * (attention + mlp + norms) + 16 + 64 * 16
    cache = 2 * 2 * 1 * 8 * 10 * 2
    assert work.bytes == 4 * (weights + cache)
    assert work.flops == 2 * weights * 6 + 4 * 2 * 2 * 8 * 10 * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nope"], "expected a preset among builtin, small, llasa-1b, llasa-3b, llasa-8b, cosyvoice2, or a folder"),
        (["--preset", "nope", "--synthetic-acceptance", "0.5"], "got 'nope': choose one of these"),
        (["--preset", "small"], "expected --synthetic-acceptance from 0 to 1 for small, whose weights are random, got None"),
        (["--preset", "builtin", "--synthetic-acceptance", "0.5"], "weights are real"),
        (["--preset", "small", "--synthetic-acceptance", "1.5"], "got 1.5"),
        ([*NEEDED, "--batches", "0"], "batches"),
        (["--preset", "llasa-8b", "--synthetic-acceptance", "0.5", "--batches", "4096"], "weights 39.0 GB"),
        (["--preset", "builtin", "--peer", "transformers"], "--peer"),
        (["--draft", "folder"], "expected a folder that `jaxspec convert` made at folder, got no such folder"),
        ([*NEEDED, "--draft", "3"], "expected --draft builtin or ngram with the preset small, whose weights are random, got '3'"),
        ([*NEEDED, "--draft", "ngram", "ngram"], "expected different drafts, got ngram, ngram: name each once"),
        (["--preset", "."], "expected --draft with ., got none: give ngram, or a folder"),
    ],
)
def test_what_cannot_be_benchmarked_is_one_clear_sentence(arguments, message):
    code, printed, err = run("bench", *arguments)
    assert code == 2
    assert not printed
    assert err.startswith("jaxspec: expected ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_requests_of_mixed_lengths_do_not_recompile():
    texts = ["Yes.", "The rain has stopped, so we can go.", "One day we met, and it was late in the year when we did."]
    speak(texts[:1], Settings())
    for codes in (40, 80, 120, 160):  # the lengths that waves are rounded up to
        builtin.builtin().decode([np.zeros(codes, np.int32)], Settings(), Stopwatch())
    before = compilations()
    for seed in range(24):
        speak([texts[seed % 3]], Settings(seed=seed))
    assert compilations() == before


def test_the_loop_touches_no_more_memory_than_it_did():
    """Bytes that the compiled program accesses, as the compiler counts them, each body of a loop once."""
    params = jax.tree.map(jnp.zeros_like, presets.random_params(jax.random.key(0), TINY))
    lm, rule = transformer.language_model(TINY), verify.coarse_grained(presets.neighbours(64, 63, 5))
    request = requests.check(jax.random.key(0), np.zeros((1, 8), np.int32), np.array([8]), 32, None, (63,), Sampling())
    lowered = speculate.generate_request.lower(lm, model_draft(lm, 3), 32, params, params, rule, request)
    assert lowered.compile().cost_analysis()["bytes accessed"] < 1.1 * 598_681
