"""The benchmark in small: its figures agree with each other, and what the loop costs is counted, not timed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import request as requests
from jaxspec import speculate, verify
from jaxspec.bench import measure, presets, roofline
from jaxspec.bench.measure import Case
from jaxspec.commands import main as cli
from jaxspec.common.stopwatch import compilations
from jaxspec.draft import model_draft
from jaxspec.models import transformer
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis import builtin
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak

TINY = Config((64, 8), 64, 16, 2, 2, 1, 8, 32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """A preset that compiles quickly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(presets.PAIRS, "small", lambda: presets.Pair(TINY, TINY, 1))
    monkeypatch.setattr(roofline, "meter", lambda dtype: lambda: roofline.Device(1e9, 1e10))


def jaxspec(monkeypatch, capsys, *arguments):
    """Runs the command; (exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["jaxspec", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bench_tells_a_table_json_and_a_picture(monkeypatch, capsys, tmp_path):
    out = tmp_path / "bench"
    sizes = ["--new-tokens", "16", "--turns", "2", "--prompts", "4", "--batches", "2", "--auto", "--out-dir", out]
    code, printed, err = jaxspec(monkeypatch, capsys, "bench", "--preset", "small", "--synthetic-acceptance", "0.5", *sizes)
    assert code == 0, err
    assert "synthetic acceptance" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads((out / "bench.json").read_text())
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [row["rule"] for row in result["rows"]] == ["autoregressive", "exact", "coarse-grained", "auto"]
    assert result["rows"][3]["taken"] in ("autoregressive", "exact K=3", "coarse-grained K=3")
    plain = result["rows"][0]
    for row in result["rows"]:
        assert row["compilations_after_warm_up"] == 0
        assert row["codes_per_s_spread"][0] <= row["codes_per_s"] <= row["codes_per_s_spread"][1]
        assert (row["compile_s"] > 0) == (row["rule"] != "auto")  # which has nothing of its own to compile
        assert row["speed_up"] == pytest.approx(row["codes_per_s"] / plain["codes_per_s"])
        if row["draft_length"]:
            assert min(row["draft_s"], row["target_s"], row["settle_s"], row["prefill_s"]) > 0
            assert 1 <= row["tokens_per_round"] <= 4


def test_synthetic_acceptance_is_of_each_position():
    keys = jax.random.split(jax.random.key(0), 2)
    params = [presets.random_params(key, TINY) for key in keys]
    ask = measure.random_asks(TINY, 1, 400, Sampling())
    models = measure.Models("tiny", TINY, TINY, *params, presets.neighbours(64, 63, 5), ask, acceptance=0.7)
    plain = Case("autoregressive", 0, 8, 4)
    _, row = measure.run(models, [plain, Case("coarse-grained", 3, 8, 4)], turns=1, say=lambda line: None)
    # About 1,260 rounds, whose counts of tokens have a deviation of 1.2: the mean is within four standard errors, 6e-5 of alarms.
    assert row["tokens_per_round"] == pytest.approx(roofline.expected_tokens(0.7, 3), abs=0.15)


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
        (["--preset", "huge", "--synthetic-acceptance", "0.5"], "small, llasa-1b"),
        (["--preset", "small"], "--synthetic-acceptance"),
        (["--preset", "builtin", "--synthetic-acceptance", "0.5"], "weights are real"),
        (["--preset", "small", "--synthetic-acceptance", "1.5"], "1.5"),
        (["--preset", "small", "--synthetic-acceptance", "0.5", "--batches", "0"], "batches"),
        (["--preset", "llasa-8b", "--synthetic-acceptance", "0.5", "--batches", "4096"], "weights 39.0 GB"),
        (["--preset", "builtin", "--peer", "transformers"], "--peer"),
    ],
)
def test_what_cannot_be_benchmarked_is_one_clear_sentence(monkeypatch, capsys, arguments, message):
    code, _, err = jaxspec(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_requests_of_mixed_lengths_compile_nothing_after_the_first():
    texts = ["Yes.", "The rain has stopped, so we can go.", "One day we met, and it was late in the year when we did."]
    speak(texts[:1], Settings())
    for codes in (40, 80, 120, 160):  # the lengths that waves are rounded up to
        builtin.builtin().decode([np.zeros(codes, np.int32)], Settings())
    before = compilations()
    for seed in range(100):
        speak([texts[seed % 3]], Settings(seed=seed))
    assert compilations() == before


def test_the_loop_touches_no_more_memory_than_it_did():
    """Bytes that the compiled program accesses, as the compiler counts them, each body of a loop once."""
    params = jax.tree.map(jnp.zeros_like, presets.random_params(jax.random.key(0), TINY))
    lm, rule = transformer.language_model(TINY), verify.coarse_grained(presets.neighbours(64, 63, 5))
    request = requests.check(jax.random.key(0), np.zeros((1, 8), np.int32), np.array([8]), 32, None, (63,), Sampling())
    lowered = speculate._generate.lower(lm, model_draft(lm, 3), 32, params, params, rule, request)
    assert lowered.compile().cost_analysis()["bytes accessed"] < 1.1 * 598_681
