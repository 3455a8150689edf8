"""Parameters of a notebook: merged in a known order, and held to what the notebook knows."""

import datetime
import re
from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import Field

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.study.parameters import (
    Held,
    check_scale,
    held_to,
    merge_parameters,
    merged,
    page_parameters,
    parameter_files,
)


@pytest.fixture(autouse=True)
def first_call(monkeypatch):
    """No page's parameters were checked before."""
    monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())


@dataclass
class Box(Held):
    width: Annotated[float, Field(gt=1)]
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Box, {"width": 2, "nams": []}, "here: unknown key 'nams': did you mean names?"),
        (Box, {"names": []}, "here: width is missing"),
        (Box, {"width": 1}, "here: width=1: Input should be greater than 1"),
        (Box, {"width": 2, "names": ["a", 3]}, "here: names: 1=3: Input should be a valid string"),
        (Box, {"width": float("inf")}, "here: width=inf: Input should be a finite number"),
        (list[int], "a", "here: 'a': Input should be a valid list"),
    ],
)
def test_what_yaml_says_is_held_to_a_type(kind, value, said):
    assert held_to(Box, {"width": 1.5, "names": ["a"]}, "here") == Box(1.5, ("a",))
    with pytest.raises(ConfigError) as error:
        held_to(kind, value, "here")
    assert str(error.value) == said


def test_files_merge_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text("seeds: [0]\nbase: {d_model: 8, steps: 1}\nx: {a: 1}\n")
    (tmp_path / "b.yaml").write_text("seeds: [1, 2]\nbase: {steps: 2}\nx: {b: 1}\n")
    (tmp_path / "empty.yaml").write_text("")
    merged = merge_parameters([tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "empty.yaml"])
    assert merged == {"seeds": [1, 2], "base": {"d_model": 8, "steps": 2}, "x": {"b": 1}}
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        merge_parameters([tmp_path / "absent.yaml"])
    (tmp_path / "text.yaml").write_text("only text\n")
    with pytest.raises(ConfigError, match=r"text\.yaml' must hold `key: value` lines"):
        merge_parameters([tmp_path / "text.yaml"])
    (tmp_path / "latin.yaml").write_bytes("title: Grüße\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"parameter file .*latin\.yaml' can't be read"):
        merge_parameters([tmp_path / "latin.yaml"])


def test_base_holds_keys_or_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("base: {steps: 1}\n")
    (tmp_path / "none.yaml").write_text("base:\n")
    assert merge_parameters([tmp_path / "a.yaml", tmp_path / "none.yaml"]) == {"base": {"steps": 1}}
    assert merge_parameters([tmp_path / "none.yaml"]) == {"base": {}}
    (tmp_path / "number.yaml").write_text("base: 3\n")
    with pytest.raises(ConfigError, match=r"number\.yaml': base=3 must hold `key: value` lines"):
        merge_parameters([tmp_path / "a.yaml", tmp_path / "number.yaml"])


@pytest.mark.parametrize("name", ["base.steps", "class", "1a", "a b", "a-b", "", 1, True, None])
def test_a_name_that_python_would_not_take_is_named(name):
    with pytest.raises(ConfigError, match=re.escape(f"{name}=3: parameters have names that Python allows")):
        merged({}, {name: 3})


@pytest.mark.parametrize(
    ("yaml", "shown"),
    [
        ("seeds: 2020-01-01", "seeds=datetime.date(2020, 1, 1)"),
        ("base: {data: {a, b}, max: !!set {c}}", "base={'data': {'a': None, 'b': None}, 'max': {'c'}}"),
        ("base: {2020-01-01: 3}", "base={datetime.date(2020, 1, 1): 3}"),
        ("arms: !!binary aGk=", "arms=b'hi'"),
        ("base: &itself {again: *itself}", "base={'again': {...}}"),
    ],
)
def test_a_value_that_no_notebook_can_be_given_is_named(yaml, shown, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(ConfigError) as error:
        merge_parameters([tmp_path / "a.yaml"])
    assert f"a.yaml': {shown} must hold only text, numbers, lists and `key: value` lines" in str(error.value)


def test_a_study_has_a_file_of_its_own_at_a_scale_where_it_needs_one(tmp_path, monkeypatch):
    assert all(file.exists() for file in parameter_files("01_convergence", "gpu"))
    monkeypatch.setattr(paths, "configs", lambda: tmp_path)
    for file in ("scale/big.yaml", "01_a.yaml", "02_b.yaml", "scale/big/01_a.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    found = {name: parameter_files(name, "big") for name in ("01_a", "02_b")}
    assert found["01_a"] == [tmp_path / file for file in ("scale/big.yaml", "01_a.yaml", "scale/big/01_a.yaml")]
    assert found["02_b"] == [tmp_path / file for file in ("scale/big.yaml", "02_b.yaml")]


def test_an_unknown_scale_names_those_that_exist(tmp_path, monkeypatch):
    for scale in ("gpuu", "../01_convergence", "", None, 1):
        with pytest.raises(ConfigError, match=f"scale={scale!r}: must be one of gpu, paper, smoke"):
            parameter_files("01_convergence", scale)
    check_scale("gpu")
    (tmp_path / "bad" / "scale").mkdir(parents=True)
    (tmp_path / "bad" / "01_a.yaml").touch()
    for name in ("ok-1", "a;touch hacked", "$(x)", "{x}"):
        (tmp_path / "bad" / "scale" / f"{name}.yaml").touch()
    monkeypatch.setattr(paths, "configs", lambda: tmp_path / "bad")
    for name in ("a;touch hacked", "$(x)", "{x}"):  # whose name a shell could take for a command is none
        with pytest.raises(ConfigError, match="must be one of ok-1$"):
            check_scale(name)
    monkeypatch.setattr(paths, "configs", lambda: tmp_path)
    for name in ("smoke", "a;touch hacked", "../x", "..", "", None):  # no configs, as outside a checkout
        with pytest.raises(ConfigError, match=f"{tmp_path} plans no run: ECMOE_CONFIGS must be"):
            check_scale(name)


def test_unknown_parameters_and_text_for_numbers_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "configs", lambda: tmp_path)
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale/smoke.yaml").write_text("")
    (tmp_path / "01_a.yaml").write_text(
        "width: 1\nrate: 0.1\nfail: false\nlimit: null\nnames: [a, b]\nrate_of: {a: 2}\n"
    )
    usual = {
        "train_missing": True,
        "width": 1,
        "rate": 0.1,
        "fail": False,
        "limit": None,
        "names": ["a", "b"],
        "rate_of": {"a": 2},
    }
    # A whole number is a number, as is any other where the usual one is whole; None is as the file has it.
    for given in ({}, {"limit": 3, "fail": True}, {"rate": 1}, {"width": 2.5}, {"names": {"a": 1}}):
        assert page_parameters("01_a", {"width": None} | given) == usual | given
    wrong = [
        ({"rate": "1e-3"}, "rate='1e-3' must be a float; YAML reads 1e-3 as text (write 1.0e-3)"),
        ({"fail": "yes"}, "fail='yes' must be a bool"),
        ({"fail": 1}, "fail=1 must be a bool"),
        ({"width": True}, "width=True must be a int"),
        ({"names": "a"}, "names='a' must be a list, such as ['a', 'b']"),
        ({"rate_of": [1]}, "rate_of=[1] must be `key: value` lines"),
        ({"widht": 2}, "01_a has no parameter 'widht' (given: 2): did you mean width?"),
    ]
    for given, said in wrong:
        monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())
        with pytest.raises(ConfigError, match=re.escape(said)):
            page_parameters("01_a", given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scale": "gpuu"}, "scale='gpuu': must be one of gpu, paper, smoke"),
        ({"scale": 3}, "scale=3: must be one of"),
        ({"train_missing": "false"}, "train_missing='false' must be a bool"),
        ({"train_missing": "false"}, "papermill's -p reads false as text (write False)"),
        ({"seeds": 3}, "seeds=3 must be a list, such as"),
        ({"arms": 5}, "arms=5 must be a list"),
        ({"base": [1]}, "base=[1] must be `key: value` lines"),
        ({"sed": [3]}, "has no parameter 'sed' (given: [3]): did you mean seeds?"),
        ({"sed": [3]}, "(in an open notebook also restart the kernel: it keeps the wrong name)"),
        ({"seeds": range(3)}, "seeds=range(0, 3) must be a list, such as"),
        ({"seeds": {1}}, "seeds={1} must be a list, such as"),
        ({"scale": ("gpu",)}, "scale=('gpu',): must be one of"),
        ({"train_missing": datetime.date(2020, 1, 1)}, "train_missing=datetime.date(2020, 1, 1) must be a bool"),
        *(({"factor": value}, "has no parameter 'factor'") for value in (4, 0.5, "x", {})),
    ],
)
def test_what_a_notebook_is_given_is_checked_before_any_work(given, said):
    with pytest.raises(ConfigError) as error:
        page_parameters("03_capacity_factor", given)
    assert said in str(error.value)


def test_what_a_notebook_is_given_wins_over_its_files(tmp_path, monkeypatch):
    unset = {
        "scale": "smoke",
        "seeds": None,
        "arms": None,
        "_private": 3,
        "pytest": pytest,
        "pair": (1, 2),
        "In": [""],
        "Out": {},
    }
    values = page_parameters("03_capacity_factor", unset)
    assert values["seeds"] == [0] and values["train_missing"] is True and "Switch top-1" in values["arms"]
    assert values["base"]["data"] == "stdlib" and set(values) <= {"scale", "seeds", "base", "arms", "train_missing"}
    changed = page_parameters(
        "03_capacity_factor", {"seeds": [5], "base": {"steps": 7}, "arms": {"mine": {"top_k": 1}}}
    )
    assert (
        changed["seeds"] == [5]
        and changed["base"] == values["base"] | {"steps": 7}
        and list(changed["arms"]) == ["mine"]
    )
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale/smoke.yaml").write_text("train_missing: false\nseeds: [0]\n")
    (tmp_path / "01_a.yaml").write_text("seeds: [3]\n")
    with monkeypatch.context() as patch:
        patch.setattr(paths, "configs", lambda: tmp_path)
        assert page_parameters("01_a", {}) == {"train_missing": False, "seeds": [3]}
        (tmp_path / "01_a.yaml").write_text("train_missing: 'false'\n")
        with pytest.raises(ConfigError, match="train_missing='false' must be a bool"):
            page_parameters("01_a", {"train_missing": True})
    with pytest.raises(ConfigError, match=re.escape(f"a list, such as {values['arms'][:3]}") + "$"):
        page_parameters("03_capacity_factor", {"arms": 5})
    assert page_parameters("03_capacity_factor", {"seeds": (5, 6)})["seeds"] == (5, 6)
    late = {"rows": [1], "seeds": [5]}  # what a notebook has made by now
    assert page_parameters("03_capacity_factor", late)["seeds"] == [5]
