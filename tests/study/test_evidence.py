"""Evidence as it is read from what runs, measurements and benches have kept."""

import base64
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from ecmoe import paths
from ecmoe.config import SCHEMA, ConfigError
from ecmoe.files import Damaged, write_json
from ecmoe.study import speed
from ecmoe.study.evidence import Evidence
from ecmoe.study.plan import by_arm, plan, record
from ecmoe.study.protocol import Part, find_claim, protocol
from ecmoe.study.verdict import (
    CONTRADICTED,
    NO_EFFECT,
    NOT_RUN,
    PLUMBING,
    REPRODUCED,
    UNDECIDED,
    judge,
    judge_all,
)
from ecmoe.training.result import Result, write_record
from tests.study.known import NOISE


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`study({arm: loss}, page)` keeps a record of every planned run of these arms, as scale gpu's."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))

    def keep(means, page, **more):
        about = find_claim("C1")  # whose page judges arms of others, too
        arms = about.arms if page == about.page else None
        evidence = Evidence("gpu", page, by_arm(page, "gpu", plan("gpu"), arms))
        for arm, mean in means.items():
            for seed, one in evidence.planned[arm].items():
                loss = mean + 0.0005 * NOISE[seed]
                summary = {"config": one.config.to_dict(), "name": one.name, "seed": seed, "schema": SCHEMA}
                summary |= {
                    "status": "finished",
                    "error": None,
                    "val_loss": loss,
                    "val_loss_causal": loss,
                    "train_loss": loss,
                }
                summary |= {"steps": one.config.steps, "tokens": one.config.steps * one.config.tokens_per_batch}
                summary |= {"device": "NVIDIA H100", "code": "abc", "routing": {}} | more
                write_record(record(one, "gpu"), Result(summary))
        return evidence

    return keep


def test_records_are_found_by_the_plan_whichever_page_planned_them(study, monkeypatch):
    study(
        {"EC-CAP2 renormalized": 3.62, "EC-CAP3 renormalized": 3.60, "EC-CF2 renormalized": 3.60}, "04_capped_experts"
    )
    found = judge("C5", "gpu")
    assert found.label == REPRODUCED and found.parts[0].effect.n == 3
    assert found.rests_on.runs == 9 and found.rests_on.seeds == (0, 1, 2)  # the fourth seed of EC-CF2 meets no other
    assert str(found.rests_on) == (
        "9 runs of 52 million tokens (seeds 0, 1, 2) of 8 layers of width 512, 64 experts, on NVIDIA H100"
    )
    study({"EC-CF2 renormalized": 3.60, "GShard top-2 renormalized, capacity 1.25": 3.58}, "01_convergence")
    beside = next(p for p in judge("C1", "gpu").parts if p.name == "against top-2 at capacity 1.25")
    assert beside.label == CONTRADICTED and beside.effect.n == 3  # an arm of page 02
    assert judge("C5", "smoke").label == PLUMBING


def test_an_invalid_page_leaves_its_own_claims_not_run_and_stops_no_other_verdict(study, monkeypatch, tmp_path):
    study(
        {"EC-CAP2 renormalized": 3.62, "EC-CAP3 renormalized": 3.60, "EC-CF2 renormalized": 3.60}, "04_capped_experts"
    )
    study({"EC-CF2 renormalized": 3.60, "Hash modulo": 3.70}, "05_other_routers")
    sound = judge_all("gpu")
    assert (sound["C5"].label, sound["C6"].label) == (REPRODUCED, REPRODUCED)
    configs = shutil.copytree(paths.configs(), tmp_path / "configs")
    monkeypatch.setenv("ECMOE_CONFIGS", str(configs))
    for wrong in ("arms: [Hush]\n", "arms: ["):
        (configs / "05_other_routers.yaml").write_text(wrong)
        found = judge_all("gpu")
        own = {id: verdict for id, verdict in found.items() if verdict.about.page == "05_other_routers"}
        assert "C6" in own and {verdict.label for verdict in own.values()} == {NOT_RUN} and found == sound | own
        assert judge("C5", "gpu") == sound["C5"]
    with pytest.raises(ConfigError, match="05_other_routers.yaml"):
        judge("C6", "gpu")


@pytest.mark.parametrize("id", protocol().claims)
def test_a_claim_names_all_runs_that_judging_it_reads_and_whether_it_reads_timings(id, monkeypatch):
    read, timings = set(), []
    monkeypatch.setattr("ecmoe.study.evidence.recorded", lambda one, scale: read.add(one.name))
    monkeypatch.setattr(speed, "kept", lambda *where: timings.append(where) or speed.NOTHING)
    judge(id, "gpu")
    claim = find_claim(id)
    runs = {one.name for of_seed in claim.runs("gpu", plan("gpu")).values() for one in of_seed.values()}
    assert runs == read and claim.timed == bool(timings)
    assert bool(read) == (id != "C2")  # which is about timings alone


def test_a_record_of_another_run_is_not_believed(study):
    arm = "EC-CF2 renormalized"
    evidence = study({arm: 3.6}, "04_capped_experts")
    first, second = (record(evidence.planned[arm][seed], "gpu") for seed in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(Damaged, match=f"{second.name} is damaged .it holds the run {first.stem}"):
        evidence.summaries(arm)


def test_a_number_of_the_routing_is_a_number_of_the_run(study):
    arm = "EC-CF2 renormalized"
    evidence = study({arm: 3.6}, "04_capped_experts", routing={"share_1": 0.25})
    assert set(evidence.values(arm, "share_1").values()) == {0.25} and evidence.values(arm, "share_2") == {}


def test_numbers_are_those_of_finished_runs_by_seed_of_a_summary_or_of_measured_rows(monkeypatch):
    evidence, asked, found = Evidence("paper", "09_causality"), [], {"a": {"rows": [1]}, "b": {"rows": [2]}}
    hows = [SimpleNamespace(what=what, name=name) for what, name in (("losses", "a"), ("other", "c"), ("losses", "b"))]
    evidence.planned = {"EC": {seed: SimpleNamespace(measures=hows) for seed in (5, 2, 7)}}
    summaries = {
        5: {"status": "finished", "val_loss": 2.5, "routing": {"share_1": 0.25}},
        2: {"status": "finished", "val_loss": 2, "routing": None},
        7: {"status": "diverged", "val_loss": 9.5, "routing": {"share_1": 0.5}},
    }
    evidence._summaries["EC"] = summaries

    def measure(result, how, **keys):
        asked.append((result.summary, how.name, keys))
        return found.get(how.name)

    monkeypatch.setattr("ecmoe.study.evidence.measure", measure)
    assert evidence.finished("EC") == {seed: summaries[seed] for seed in (5, 2)}
    assert evidence.values("EC", "val_loss") == {5: 2.5, 2: 2.0} and evidence.values("EC", "share_1") == {5: 0.25}
    assert evidence.summaries("none") == evidence.values("none", "val_loss") == {}
    assert evidence.measured("EC", 2, "losses") == [{"rows": [1]}, {"rows": [2]}]
    keys = {"scale": "paper", "train": False, "keep": True}
    assert asked == [(summaries[2], "a", keys), (summaries[2], "b", keys)]
    rows = [{"way": "as trained", "loss": 4.0}, {"way": "causally", "loss": 5.0}]
    found["a"] = {"rows": rows}
    assert evidence.values("EC", "losses/causally") == {5: 5.0, 2: 5.0} and evidence.values("EC", "losses/x") == {}
    del found["b"]  # whole or not at all
    assert evidence.measured("EC", 2, "losses") == [] and evidence.values("EC", "losses/causally") == {}


def test_time_is_the_share_of_steps_times_what_a_whole_run_of_it_takes_a_step(monkeypatch):
    evidence, ms = Evidence("gpu", "01_convergence"), {("half", "b"): 9.0, ("all", "b"): 1.5}
    values = {"half": {0: 4.0, 1: 4.0}, "all": {0: 3.0, 1: 3.0}, "b": {1: 3.5, 0: 4.0}}
    monkeypatch.setattr(evidence, "values", lambda arm, column: values[arm] if column == "train_loss" else {})
    monkeypatch.setattr(evidence, "step_time", lambda a, b: ms[a, b])
    found = [
        evidence.estimate(Part("p", ("half", "all"), "below", "", "train_loss", ("b",), how=how, over=(0.5, 1.0)))
        for how in ("steps", "time")
    ]
    shares = [0.5, math.exp((math.log(0.5) + math.log(1.0)) / 2)]  # seed 0 at its half, seed 1 in the middle
    assert [one.value for one in found] == [
        pytest.approx(takes * math.sqrt(shares[0] * shares[1])) for takes in (1.0, 1.5)
    ]


def test_arms_of_a_part_count_alike_or_by_their_doublings(monkeypatch):
    evidence = Evidence("gpu", "06_number_of_experts")
    values = {"16": {0: 4.0, 1: 5.0}, "32": {0: 3.0, 1: 4.5}, "128": {0: 1.0, 1: 2.5}, "b": {1: 1.0, 0: 2.0}}
    monkeypatch.setattr(evidence, "values", lambda arm, column: values[arm])
    mean, slope = (
        evidence.estimate(Part("p", ("16", "32", "128"), "below", "", "val_loss", b, over=over))
        for b, over in ((("b", "16"), ()), ((), (16, 32, 128)))
    )
    assert mean.value == pytest.approx(((8 / 3 - 3) + (4 - 3)) / 2)  # of each seed, over its arms
    by_hand = [np.polyfit([4, 5, 7], losses, 1)[0] for losses in ((4.0, 3.0, 1.0), (5.0, 4.5, 2.5))]
    assert slope.value == pytest.approx(np.mean(by_hand)) and mean.n == slope.n == 2


def test_a_run_that_diverged_is_missing_and_said_to_be(study):
    study(
        {"EC-CAP2 renormalized": 3.62, "EC-CAP3 renormalized": 3.60, "EC-CF2 renormalized": 3.60}, "04_capped_experts"
    )
    study({"EC-CAP3 renormalized": 3.60}, "04_capped_experts", status="diverged")  # its last loss counts for nothing
    found = judge("C5", "gpu")
    assert found.label == UNDECIDED and found.parts[1].label == NOT_RUN and found.rests_on.runs == 6
    assert found.parts[1].missing == tuple(("EC-CAP3 renormalized", seed) for seed in range(3))


def keep_measure(one, how, found, **made):
    path = paths.results("gpu", "measures") / one.name / f"{how.name}.json"
    write_json(path, {"run": one.name, "what": how.what, "keys": how.keys, "found": found, **made}, sealed=True)


def test_measurements_and_benches_are_read_where_the_engine_keeps_them(study):
    arms = dict.fromkeys(("EC-CF2 renormalized", "GShard top-2 renormalized", "Switch top-1", "Dense"), 3.5)
    evidence = study(arms, "07_fine_tuning")
    rng = np.random.default_rng(0)
    for arm in arms:
        for one in evidence.planned[arm].values():
            for how in one.measures:
                bits = (rng.random(203) < (0.8 if arm.startswith("EC") else 0.6)).astype(np.uint8)  # no whole bytes
                packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
                row = {"validation": 203, "majority": 0.5, "accuracy": bits.mean()}
                keep_measure(one, how, {"rows": [row], "right": packed, "right_causal": packed})
    assert evidence.config("Dense").seed == 0
    found = judge("C4", "gpu")
    assert found.label == REPRODUCED and found.parts[0].effect.value == pytest.approx(0.2, abs=0.03)
    assert found.parts[4].effect.value == pytest.approx(0.3, abs=0.03) and found.rests_on.size.startswith("12 layers")
    assert judge("C1", "gpu", page="07_fine_tuning").label == NO_EFFECT  # the same losses at the paper's size
    one, summary = evidence.planned["Dense"][1], evidence.summaries("Dense")[1]
    assert evidence.as_measured("Dense", 1, "fine-tuned") == [summary] * len(one.measures)
    keep_measure(one, one.measures[0], {"rows": [row], "right": packed, "right_causal": packed}, device="H200")
    measured = evidence.as_measured("Dense", 1, "fine-tuned")
    assert measured == [summary | {"device": "H200"}, *[summary] * (len(one.measures) - 1)]
    assert evidence.as_measured("Dense", 1, "losses") == []
    assert (evidence.right("Dense", "accuracy - majority")[1][0] == bits - 0.5).all()
    (paths.results("gpu", "measures") / one.name / f"{one.measures[0].name}.json").unlink()
    assert set(evidence.right("Dense", "accuracy_causal")) == {0, 2}

    losses = {"as trained": 3.60, "sequence": 3.65, "global top-k": 3.62, "causally": 3.61}
    evidence = study({"EC-CF2 renormalized": 3.6}, "09_causality")
    for one in evidence.planned["EC-CF2 renormalized"].values():
        for how in one.measures:
            if how.what == "losses":
                rows = [{"way": way, "loss": loss + 0.001 * one.seed} for way, loss in losses.items()]
                keep_measure(one, how, {"rows": rows})
            if how.what == "next-token":
                told = [("as trained", 0.5), ("causally", 0.1)]
                rows = [
                    {"given": g, "routing": r, "bits": bits * (1 + (g == "unigram"))}
                    for g in ("unigram", "the model")
                    for r, bits in told
                ]
                keep_measure(one, how, {"rows": rows})
    assert judge("L2", "gpu").label == REPRODUCED
    knows = next(
        p for p in judge("L1", "gpu").parts if p.name == "what the routing of the batch knows of the next token"
    )
    assert knows.effect.value == pytest.approx(0.4 * math.log(2))  # nats, beyond the model's own prediction

    def step(arm, routing, ms, mode="compiled, CUDA graph"):
        return {"arm": arm, "routing": routing, "ms": ms, "samples_ms": [ms, ms + 0.01, ms - 0.01], "mode": mode}

    rows = [step("EC-CF2", "own", 11.0), step("EC-CF2", "own", 10.0), step("GShard top-2", "even", 11.0)]
    setting = {"layers": 12, "d_model": 768, "num_experts": 64, "device": "NVIDIA H100"}
    rows = [*rows, step("GShard top-2", "own", 9.0), step("EC-CF2", "own", 20.0, "compiled")]
    rows += [step("GShard top-2", "even", 50.0, "compiled"), step("GShard top-2", "even", 30.0, "compiled")]
    write_json(paths.results("paper", "bench") / "step.json", {"rows": rows, "setting": setting}, sealed=True)
    found = judge("C2", "paper")
    assert str(found.rests_on) == "3 turns of training steps of 12 layers of width 768, 64 experts, on NVIDIA H100"
    # each on its fastest path; the router's own routing; in one mode: both compiled, both in CUDA graphs
    assert [part.effect.value for part in found.parts] == pytest.approx([1.1, 0.9, 1.5, 1.1], rel=1e-3)
    timed = [{"arm": arm, "ms": 10.0 + i} for i, arm in enumerate(speed.study_arms("paper"))]
    write_json(
        paths.results("paper", "bench") / f"{speed.study_file(speed.study_arms('paper'))}.json",
        {"rows": timed},
        sealed=True,
    )
    assert Evidence("paper", "").step_time(timed[3]["arm"], timed[0]["arm"]) == 1.3
    for pair in (("no arm", timed[0]["arm"]), (timed[0]["arm"], "no arm")):
        assert math.isnan(Evidence("paper", "").step_time(*pair))


def test_a_part_lacks_seeds_that_all_its_arms_plan_with_what_it_reads(monkeypatch):
    def run(*whats):
        return SimpleNamespace(measures=[SimpleNamespace(what=what) for what in whats])

    evidence = Evidence("gpu", "09_causality")
    one, other = {16: run("losses"), 8: run("losses"), 1: run("losses", "more"), 3: run()}, run("losses")
    planned = {"EC": one, "GShard": {8: other, 16: other, 5: other}}
    monkeypatch.setattr(evidence, "planned", planned)
    monkeypatch.setattr(evidence, "finished", lambda arm: {8: {}})
    monkeypatch.setattr(evidence, "measured", lambda arm, seed, what: [{"rows": []}] if arm == "EC" else [])

    def lacks(of, *arms, how="difference"):
        return evidence.lacks(Part("p", arms, "below", "", of, how=how))[0]

    assert lacks("val_loss", "EC") == [("EC", 1), ("EC", 3), ("EC", 16)]
    assert lacks("losses/sequence - losses/as trained", "EC") == [("EC", 1), ("EC", 16)]  # seed 3 is never measured
    assert lacks("val_loss", "EC", "GShard") == [("EC", 16), ("GShard", 16)]  # seed 5 of one alone pairs with nothing
    assert lacks("losses/sequence", "GShard") == [("GShard", 5), ("GShard", 8), ("GShard", 16)]  # trained, not measured
    assert lacks("accuracy", "EC", how="accuracy") == lacks("val_loss", "other") == lacks("own", how="bench") == []


def test_a_finished_run_may_lack_a_column_that_is_newer(study):
    arm, other = "EC-CF2 renormalized", "GShard top-2 renormalized"
    evidence = study({arm: 3.6, other: 3.6}, "01_convergence")

    def lacks(of, a=arm, how="difference"):
        return evidence.lacks(Part("p", (a,), "below", "", of, (other,), how=how))[1]

    assert lacks("share_1") == [(name, seed) for name in (arm, other) for seed in range(4)]
    assert lacks("val_loss") == lacks("accuracy", how="accuracy") == lacks("own", how="bench") == []
    write_record(
        record(evidence.planned[arm][1], "gpu"), Result(evidence.summaries(arm)[1] | {"routing": {"share_1": 0.5}})
    )
    record(evidence.planned[other][2], "gpu").unlink()
    evidence._summaries.clear()
    expected = [(name, seed) for name in (arm, other) for seed in range(4)]
    assert lacks("share_1") == [one for one in expected if one not in ((arm, 1), (other, 2))]  # the latter is missing
    assert lacks("val_loss - share_1") == lacks("share_1")


def test_a_verdict_names_the_pages_that_would_train_what_it_lacks(study):
    study({"EC-CF2 renormalized": 3.6}, "04_capped_experts", routing={f"share_{j}": 0.1 for j in range(9)})
    assert (
        not judge("C7", "gpu").lacks
        and judge("C5", "gpu").command == "ecmoe runs 04_capped_experts --scale gpu --train"
    )
    evidence = Evidence("gpu", "04_capped_experts", by_arm("04_capped_experts", "gpu", plan("gpu")))
    record(evidence.planned["EC-CF2 renormalized"][3], "gpu").unlink()
    found = judge("C7", "gpu")
    assert found.lacks and found.command == "ecmoe runs 01_convergence --scale gpu --train"  # which alone plans seed 3
    assert found.parts[0].missing == (("EC-CF2 renormalized", 3),)
    first = evidence.planned["EC-CF2 renormalized"][0]
    record(first, "gpu").unlink()
    assert first.pages[0] == "01_convergence"  # the claim's own page is named, although it comes later
    assert judge("C7", "gpu").command == "ecmoe runs 04_capped_experts 01_convergence --scale gpu --train"
