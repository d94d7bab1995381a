"""The simulated fleet against queueing theory, its seed, its bad input, and the files that it reads."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspec.synthesis.windows import FIRST_CODES

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import simulate_fleet
from simulate_fleet import BY_LOAD, LOOPS, PLAIN, ROUNDS, Costs, Speech, simulate

FLEET = Path(__file__).parent.parent / "results" / "fleet"
COSTS = Costs((1, 4, 16), (0.004, 0.004, 0.010), (0.006, 0.008, 0.030), 0.003, 3)
SPEECH = Speech(np.array([1.0, 2.0, 3.0]), 50, 0.61, 10)


def test_a_server_of_constant_time_waits_as_long_as_theory_says():
    """M/D/1: the mean wait is D rho / (2 (1 - rho)). The mean of 40,000 requests varies by 2.3 % over seeds."""
    load, step_s = 0.6, 0.25
    costs, speech = Costs((1,), (step_s,), (step_s,), 0.0, 0), Speech(np.array([1.0]), 1, 0.0, 1)
    outcome = simulate(costs, speech, PLAIN, 1, load / step_s, 50_000, seed=0)
    np.testing.assert_allclose(outcome.first_s.mean() - step_s, step_s * load / (2 * (1 - load)), rtol=0.05)
    np.testing.assert_array_equal(outcome.first_s, outcome.whole_s)


def test_slots_wait_as_long_as_theory_says():
    """M/M/c: Erlang's C over c mu - lambda, and half a step, as a request waits for the next; lengths are geometric.

    The mean of 6,400 requests varies by 5.8 % over seeds.
    """
    slots, step_s, codes, load = 4, 0.01, 50, 0.6
    lengths = np.random.default_rng(1).geometric(1 / codes, 100_000).astype(float)
    costs, speech = Costs((slots,), (step_s,), (step_s,), 0.0, 0), Speech(lengths, 1, 0.0, 1)
    service_s = step_s * lengths.mean()
    offered = slots * load
    outcome = simulate(costs, speech, PLAIN, 1, offered / service_s, 8000, seed=0)
    last = offered**slots / math.factorial(slots) / (1 - load)
    queued = last / (sum(offered**k / math.factorial(k) for k in range(slots)) + last)
    wait_s = queued * service_s / (slots - offered)
    np.testing.assert_allclose(outcome.first_s.mean() - 1.5 * step_s, wait_s, rtol=0.12)


def test_a_full_chip_makes_the_codes_that_its_costs_allow():
    """All at once: a chip of 16 slots makes 16 codes a step, or 16 times the mean of a round."""
    for loop, seconds, codes in ((PLAIN, 0.010, 1.0), (ROUNDS, 0.030, (1 - 0.61**4) / 0.39)):
        outcome = simulate(COSTS._replace(prefill_s=0.0), SPEECH, loop, 1, 1e6, 2000, seed=0)
        made = 2000 * 2.0 * 50
        np.testing.assert_allclose(outcome.whole_s.max(), made / 16 / codes * seconds, rtol=0.04)


def test_the_loop_changes_with_the_load():
    assert simulate_fleet.loop_at_load(COSTS, SPEECH, BY_LOAD) == [True, True, False]
    few = {loop: simulate(COSTS, SPEECH, loop, 1, 0.5, 400, seed=3).whole_s.mean() for loop in LOOPS}
    many = {loop: simulate(COSTS, SPEECH, loop, 1, 1e6, 400, seed=3).whole_s.max() for loop in LOOPS}
    assert few[BY_LOAD] == few[ROUNDS] < 0.8 * few[PLAIN]
    assert many[BY_LOAD] < many[ROUNDS]
    assert many[BY_LOAD] < 1.02 * many[PLAIN]


def test_a_seed_reproduces_and_another_differs():
    one, again, other = (simulate(COSTS, SPEECH, ROUNDS, 3, 20, 300, seed).first_s for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_requests_go_to_the_chip_with_the_fewest():
    """Two chips of one slot: at a load of 0.7 the mean wait is well below the 1.17 steps of each chip by itself."""
    costs, speech = Costs((1,), (1.0,), (1.0,), 0.0, 0), Speech(np.array([1.0]), 1, 0.0, 1)
    assert simulate(costs, speech, PLAIN, 2, 1.4, 5000, seed=0).first_s.mean() - 1 < 0.8


@pytest.fixture
def files(tmp_path):
    """The arguments for a costs file and a durations file."""

    def program(seconds):
        return {"cycles_s": seconds, "bandwidth_bound_s": seconds / 2}

    plans = [
        {"batch": batch, "draft_length": 3, "step": program(step), "round": program(drafted), "prefill": program(0.003)}
        for batch, step, drafted in zip(*COSTS[:3], strict=True)
    ]
    costs, durations = tmp_path / "costs.json", tmp_path / "durations.json"
    costs.write_text(json.dumps({"plans": plans}))
    durations.write_text(json.dumps({"seconds": SPEECH.seconds.tolist()}))
    return ["--costs", str(costs), "--durations", str(durations)]


def test_the_table_has_a_line_for_each_rate_and_loop(files, tmp_path, capsys):
    out = tmp_path / "fleet.json"
    simulate_fleet.main([*files, "--rates", "10", "10000", "--requests", "300", "--pod", "2", "--json", str(out)])
    said = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["rate"], row["loop"]) for row in rows] == [(rate, loop) for rate in (10, 10_000) for loop in LOOPS]
    assert said.count("\n| ") == 3 + 1 + 6
    assert "| 1 | 4.00 | 6.00 | 250 | 368 | 1.47x faster |" in said
    assert "| 16 | 10.00 | 30.00 | 1,600 | 1,178 | 1.36x slower |" in said
    assert all(row["first_s_p95"] <= 0.5 and row["rtf_p95"] <= 1 for row in rows)
    plain, drafted, by_load = rows[3:]
    assert by_load["chips"] < 1.02 * plain["chips"] < drafted["chips"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--acceptance", "1.5"], "expected --acceptance from 0 to 1, got 1.5"),
        (["--rates", "10", "0"], "expected --rates above 0, got 0.0"),
        (["--pod", "0"], "expected --pod above 0, got 0"),
        (["--costs", "nowhere.json"], "expected plans in nowhere.json"),
        (["--durations", "nowhere.json"], "expected durations in nowhere.json"),
        (["--first-p95-s", "0.001"], "expected a chip that gives 95 % of its requests their first audio within 0.001 s"),
    ],
)
def test_bad_input_is_one_sentence(files, change, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        simulate_fleet.main([*files, "--requests", "50", *change])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_the_first_chunk_is_that_of_the_server(files):
    assert simulate_fleet.arguments(files).first_codes == FIRST_CODES


@pytest.mark.parametrize("path", sorted(FLEET.glob("*-v*.json")), ids=lambda path: path.stem)
def test_the_inputs_of_the_page_can_be_read(path):
    costs = simulate_fleet.read_costs(path)
    assert costs.prefill_s > 0
    assert all(step < drafted for step, drafted in zip(costs.step_s, costs.round_s, strict=True))
    assert simulate_fleet.read_durations(FLEET / "durations.json").size == 200
