"""The plan: what pages rest on, from YAML alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.study import engine, plan, speed

LIGHT = """
import sys
from ecmoe.study.plan import plan
runs = plan("gpu")
heavy = {"torch", "lightning", "pandas", "nbformat", "papermill"} & set(sys.modules)
from ecmoe.report import index, page  # a page of stored results needs no torch either
heavy |= {"torch", "lightning"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy or len(runs) < 100 else 0)
"""


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A scale and two pages that share a run."""
    write = lambda name, text: (tmp_path / name).write_text(text)  # noqa: E731
    (tmp_path / "scale/big").mkdir(parents=True)
    write("scale/big.yaml", "scale: big\nseeds: [0, 1]\nbase: {steps: 40, d_ff: 100}\n")
    write(
        "arms.yaml",
        "EC: {}\nHalf: {steps: 1/2}\nWide: {router: dense, d_ff: 7/6}\nTop: {router: token_choice, top_k: 2}\nSlow: {warmup_steps: 1/2}\n",
    )
    write("01_a.yaml", "arms: [EC, Half]\nmeasures: {decoding: {arms: [EC], seeds: [0]}, dependence: }\n")
    write(
        "02_b.yaml",
        "arms: [Top, EC]\nseeds: [1, 0]\nmeasures: {losses: {pools: [4]}, dependence: , decoding: {tokens: 3}}\n",
    )
    monkeypatch.setattr(paths, "configs", lambda: tmp_path)
    yield write


def test_every_run_once_seed_by_seed_with_all_that_pages_want_of_it(configs):
    runs = plan.plan("big")
    assert [(one.arms[0], one.seed) for one in runs] == [
        ("EC", 0), ("Half", 0), ("EC", 1), ("Half", 1), ("Top", 0), ("Top", 1),
    ]  # fmt: skip
    first = runs[0]
    assert first.pages == ("01_a", "02_b") and first.name == first.config.name
    asked = [[(how.what, how.keys) for how in one.measures] for one in runs]
    once, longer = ("dependence", {}), [("losses", {"pools": [4]}), ("decoding", {"tokens": 3})]
    assert asked[0] == [("decoding", {}), once, *longer]  # the same once, with other keys another
    assert asked[2] == [once, *longer] and asked[1] == asked[3] == [once]
    assert asked[4] == asked[5] == [longer[0], once, longer[1]]
    assert [one.config.steps for one in runs[:2]] == [40, 20]
    assert [one.arms[0] for one in plan.plan("big", ["02_b"])] == ["Top", "EC", "Top", "EC"]
    configs("03_c.yaml", "arms: {Mine: {}}\nseeds: [0]\n")  # the first, by another name
    named = plan.plan("big")
    assert [one.name for one in named] == [one.name for one in runs]
    assert (named[0].arms, named[0].pages) == (("EC", "Mine"), ("01_a", "02_b", "03_c")) and named[2].arms == ("EC",)


def test_blocks_come_in_their_order_each_seed_whole_before_the_next(configs):
    configs("order.yaml", "- [Top]\n- [02_b, Half]\n")
    assert [(one.arms[0], one.seed) for one in plan.plan("big")] == [
        ("Top", 0), ("Top", 1), ("EC", 0), ("Half", 0), ("EC", 1), ("Half", 1),
    ]  # fmt: skip


def test_a_share_is_of_the_base(configs):
    configs("03_c.yaml", "arms: [Wide]\n")
    assert plan.plan("big", ["03_c"])[0].config.d_ff == 120  # 116.7, in eights
    configs("03_c.yaml", "arms: [Wide]\nbase: {d_ff: 99}\n")
    assert plan.plan("big", ["03_c"])[0].config.d_ff == 120  # 115.5, never less
    configs("03_c.yaml", "arms: {Mine: {steps: 12}}\n")  # an arm of one's own has no share
    assert plan.plan("big", ["03_c"])[0].config.steps == 12
    configs("04_d.yaml", "arms: [Slow]\n")
    assert plan.plan("big", ["04_d"])[0].config.warmup_steps == RunConfig().warmup_steps // 2 > 0  # base doesn't say it
    configs("03_c.yaml", "arms: [Half]\nbase: {steps: 41}\n")
    with pytest.raises(ConfigError, match="page '03_c': arm 'Half': 1/2 of the scale's steps is 20.5"):
        plan.plan("big")


def test_arms_vary(configs):
    configs("03_c.yaml", "arms: [EC]\nseeds: [7]\nvary: {learning_rate: [0.001, 0.002], num_experts: [4, 8]}\n")
    runs = plan.plan("big", ["03_c"])
    assert [one.arms[0] for one in runs][:2] == [
        "EC, learning rate 0.001, num experts 4",
        "EC, learning rate 0.001, num experts 8",
    ]
    last = runs[-1].config
    assert (last.learning_rate, last.num_experts, last.seed) == (0.002, 8, 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: [ECC]", "there is no arm 'ECC': did you mean EC?"),
        ("arms: [Quux]", "there is no arm 'Quux': configs/arms.yaml names them all"),
        ("arms: EC", "arms='EC' must be a list, such as ['EC']"),
        ("arms: 5", "arms=5 must be a list"),
        ("arms: {EC: 3}", "arm 'EC' must hold `key: value` lines, but holds 3"),
        ("arms: {Mine: {step: 3}}", "arm 'Mine': unknown key 'step' with value 3: did you mean steps?"),
        ("arms: {Mine: {top_k: 99, router: token_choice}}", "arm 'Mine': top_k=99"),
        (
            "arms: [EC]\nmeasures: {decoding: {arms: [Half]}}",
            "measurement 'decoding' names arm 'Half': must be one of EC",
        ),
        ("arms: [EC]\nmeasures: [decoding]", "measures=['decoding'] must hold `key: value` lines"),
        ("arms: [EC]\nseeds: 3", "seeds=3 must be a list"),
        ("arms: [EC]\nseeds: [true]", "seeds=[True] must be a list of whole numbers, not of True"),
        ("arms: [EC]\nseeds: {0: 1}", "seeds={0: 1} must be a list"),
        ("arms: [EC]\nseeds: [0, 1, 0]", "seeds=[0, 1, 0] holds 0 twice"),
        ("arms: [EC]\nseeds: []", "seeds=[] must name at least one"),
        ("arms: [EC]\nvary: {steps: []}", "vary: steps=[] must name at least one"),
        ("arms: {}", "arms={} must name at least one"),
        ("arms: [EC]\nbase: {seed: 3}", "arm 'EC': seed=3 can't be set by an arm: list it in `seeds`"),
        ("arms: {Mine: {seed: 3}}", "arm 'Mine': seed=3 can't be set by an arm"),
        ("arms: [EC]\nvary: [steps]", "03_c.yaml': vary=['steps'] must hold `key: value` lines"),
        ("arms: [EC]\nvary: {steps: 3}", "vary: steps=3 must be a list"),
        ("arms: [EC]\nvary: {steps: }", "vary: steps=None must be a list"),
        ("arms: [Half]\nbase: {steps: 1e-3}", "base: steps='1e-3' must be a whole number: arm 'Half' has 1/2 of it"),
        ("arms: [{}]", "arms=[{}] must be a list of names"),
        ("arms: [EC]\nseeds: [[]]", "seeds=[[]] must be a list of whole numbers"),
        ("arms: [EC]\nmeasures: {decoding: x}", "measures: decoding='x' must hold `key: value` lines"),
        ("arms: [EC]\nmeasures: {decoding: {tokens: x}}", "measurement 'decoding': tokens='x'"),
        ("arms: [EC]\nmeasures: {dependence: {kept: 0}}", "kept=0: 0: Input should be greater than or equal to 1"),
        ("arms: [EC]\nmeasures: {losses: {pools: [0.5]}}", "measurement 'losses': pools=[0.5]"),
        ("arms: [EC]\nmeasures: {fine-tuned: {task: [rte], steps: -1}}", "measurement 'fine-tuned': steps=-1"),
        ("arms: [EC]\nmeasures: {accuracy-at: {places: [.nan]}}", "measurement 'accuracy-at': places=nan"),
        ("arms: [EC]\nmeasures: {decoding: {arms: 5}}", "measures: decoding: arms=5 must be a list"),
        ("arms: [EC]\nmeasures: {decoding: {seeds: [a]}}", "measures: decoding: seeds=['a'] must be a list of whole"),
        ("arms: [EC]\nmeasures: {decoding: {seeds: []}}", "measures: decoding: seeds=[] must name at least one"),
        ("measures: {decoding: }", "measures: decoding: arms=[] must name at least one"),
    ],
)
def test_what_cannot_be_planned_names_the_page(configs, text, said):
    configs("03_c.yaml", text)
    with pytest.raises(ConfigError) as error:
        plan.plan("big")
    assert str(error.value).startswith("page '03_c': ") and said in str(error.value)
    assert len(plan.plan("big", ["01_a"])) == 4  # the others can be had


def test_a_page_that_cannot_be_read_stops_no_other(configs, monkeypatch):
    of_page = plan.of_page
    for error in (ConfigError("wrong"), PermissionError("no access")):

        def fails(page, scale, error=error):
            if page == "01_a":
                raise error
            return of_page(page, scale)

        monkeypatch.setattr(plan, "of_page", fails)
        planned, wrong = plan.sound("big")
        assert {one.pages for one in planned} == {("02_b",)} and wrong == {"01_a": error}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("order.yaml", "01_a: [EC]\n", "order.yaml: {'01_a': ['EC']}: Input should be a valid list"),
        ("order.yaml", "- 01_a\n", "order.yaml: 0='01_a': Input should be a valid list"),
        ("order.yaml", "- [EC, {a: b}]\n", "order.yaml: 0: 1={'a': 'b'}: Input should be a valid string"),
        ("order.yaml", "- [01_b]\n", "order.yaml: there is no page or arm '01_b': did you mean 02_b?"),
        ("order.yaml", "- [quux]\n", "order.yaml: there is no page or arm 'quux': leave it out"),
        ("arms.yaml", "", "arms.yaml: None: Input should be a valid dictionary"),
        ("arms.yaml", "EC: expert_choice\n", "arms.yaml: EC='expert_choice': Input should be a valid dictionary"),
        ("arms.yaml", "EC:\n", "arms.yaml: EC=None: Input should be a valid dictionary"),
        ("arms.yaml", "EC: [", "page '01_a': arms '/"),
    ],
)
def test_what_cannot_be_an_order_or_arms_is_named(configs, file, text, said):
    configs(file, text)
    with pytest.raises(ConfigError) as error:
        plan.plan("big")
    assert said in str(error.value)


def test_a_key_may_vary_between_yes_and_no(configs):
    configs("03_c.yaml", "arms: [EC]\nseeds: [0]\nvary: {compile: [true, false]}\n")
    assert [one.config.compile for one in plan.of_page("03_c", "big")] == [True, False]


def test_a_page_without_arms_plans_no_run(configs):
    configs("03_c.yaml", "seeds: [0]\n")
    assert plan.plan("big", ["03_c"]) == []


def test_a_page_without_seeds_plans_no_run(configs):
    configs("03_c.yaml", "arms: [EC]\nseeds:\nmeasures: {dependence: , decoding: {arms: [EC], seeds: [0]}}\n")
    assert plan.plan("big", ["03_c"]) == []
    assert len(plan.of_page("01_a", "big")) == 4 and plan.of_page("01_a", "big", {"seeds": None}) == []


def test_a_scale_without_a_base_is_named(configs):
    configs("scale/big.yaml", "")
    with pytest.raises(ConfigError, match=r"base: configs/scale/big.yaml must hold it"):
        plan.plan("big")


def test_unknown_names_suggest_the_near_one(configs):
    with pytest.raises(ConfigError, match="no page '01_x': did you mean 01_a"):
        plan.plan("big", ["01_x"])
    with pytest.raises(ConfigError, match="scale='huge': must be one of big"):
        plan.plan("huge")


def test_the_plan_of_this_checkout_needs_neither_torch_nor_notebooks():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


@pytest.mark.parametrize("scale", ["smoke", "gpu", "paper"])
def test_an_arm_has_one_name(scale):
    """The same run under two names would be two arms of a figure."""
    names = {one.name: one.arms for one in plan.plan(scale)}
    for name, called in names.items():
        sizes = [arm for arm in called if arm.endswith("experts")]  # 64 experts are the study's own number
        assert len(called) - len(sizes) <= 1, (name, called)


def test_what_was_committed_is_planned(monkeypatch):
    """Who changes a row of a config leaves the runs that it planned on no page: their names hold all that they were."""
    monkeypatch.setenv("ECMOE_HOME", str(Path(__file__).parents[2]))
    planned = {file for one in plan.plan("gpu") for file in engine.files(one, "gpu")}
    assert (
        set(paths.results("gpu", "runs").glob("*.json")) | set(paths.results("gpu", "measures").glob("*/*.json"))
        <= planned
    )
    timed = {file for file in paths.results("gpu", "bench").glob("*.json") if not file.name.startswith("scaling")}
    assert timed == set(speed.files("gpu"))


def test_the_rates_come_first_the_centre_next_and_the_largest_last():
    """A machine that is taken away leaves what is worth most; a further page has any place, or the last if order.yaml doesn't name it."""
    runs = plan.plan("gpu")
    begun = dict.fromkeys(int(one.pages[0][:2]) for one in runs)  # by the first that needs a run
    order = [14, 1, 12, 2, 3, 4, 5, 6, 9, 13, 10, 11, 7]  # page 03 shows an arm of page 02
    assert [page for page in begun if page in order] == order
    place = {(one.arms[0], one.seed): i for i, one in enumerate(runs)}
    for arm in ("Hash modulo", "Hash balanced"):  # of page 05, but with the first seed of pages 03 and 04
        assert place[arm, 0] < place["EC-CAP2 renormalized", 1]


def test_configs_without_pages_are_no_checkout(tmp_path, monkeypatch):
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale/ok.yaml").touch()
    monkeypatch.setenv("ECMOE_CONFIGS", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path} plans no run: ECMOE_CONFIGS must be the configs/ of a checkout"):
        plan.plan("ok")
