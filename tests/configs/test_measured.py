"""What pages measure of trained models, and what they time, is what they speak of."""

import re
from itertools import pairwise

import pytest

from tests.configs.rows import CENTRE, SCALES, arms, values


@pytest.mark.parametrize("scale", SCALES)
def test_each_measurement_is_of_the_arms_that_its_page_speaks_of(scale):
    capped, tuned, causal = (values(page, scale) for page in ("04_capped_experts", "07_fine_tuning", "09_causality"))
    assert all(asked == {"arms": [capped["free"]]} for asked in capped["measures"].values())
    assert causal["measures"]["decoding"] == {"arms": [causal["served"]], "seeds": causal["seeds"][:1]}
    of_all = [
        tuned["measures"]["fine-tuned"],
        *(causal["measures"][what] for what in ("losses", "next-token", "dependence")),
    ]
    assert all({"arms", "seeds"}.isdisjoint(asked) for asked in of_all)
    # Tables 2 and 3; at other scales a task that every machine has.
    eleven = ["boolq", "cb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wic", "wnli"]
    assert of_all[0]["task"] == (eleven if scale == "gpu" else ["lines"])


@pytest.mark.parametrize("scale", SCALES)
def test_models_are_served_with_every_pool_that_one_was_trained_on(scale):
    """And with the fewest tokens of which an expert takes one, e/c."""
    shown, pools = arms("09_causality", scale), values("09_causality", scale)["measures"]["losses"]["pools"]
    trained = {config.pool for config in shown.values() if config.router == "expert_choice"}
    config = shown[CENTRE]
    words = {"sequence": config.sequence_length, "batch": config.batch_size * config.sequence_length}
    sizes = [words.get(pool, pool) for pool in pools if pool != "position"]
    assert trained <= set(pools) and sizes == sorted(set(sizes))
    assert sizes[0] == config.num_experts / config.capacity_factor
    assert any(words["sequence"] < pool < words["batch"] for pool in trained if isinstance(pool, int))


@pytest.mark.parametrize("scale", SCALES)
def test_networks_trained_with_most_places_are_measured_with_as_few_as_others(scale):
    def places(names):
        return {name: float(re.search(r"([\d.]+) places?", name)[1]) for name in names if name != "Dense"}

    asked, trained = values("10_vision", scale)["measures"]["accuracy-at"], places(arms("10_vision", scale))
    assert set(asked["arms"]) == {name for name, count in trained.items() if count == max(trained.values())}
    assert asked["places"] == sorted(set(places(arms("10_vision", "gpu")).values()))


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_what_is_timed_grows_by_equal_steps_around_a_usual_layer(scale):
    rows = values("08_step_time", scale)
    for name, size in {**rows["layer_sizes"], "growth": rows["growth_from"]}.items():
        assert size["d_ff"] == 4 * size["d_model"] and 2 * size["n"] % size["num_experts"] == 0, name
    for axis, numbers in rows["growth_axes"].items():
        assert len(numbers) > 2 and len({after / before for before, after in pairwise(numbers)}) == 1, axis
        assert numbers[0] < rows["growth_from"][axis] < numbers[-1], axis
    assert rows["repeats"] % 2 and rows["repeats"] > 5  # the median is a sample, and its quartiles are others
    if scale == "smoke":  # which no GPU is needed for
        assert (rows["auto_sizes"], rows["step_sizes"], rows["scaling"]) == ([], {}, {"devices": [1]})
