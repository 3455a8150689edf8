"""Rows of routers: what a config refuses, and a router that README tells how to add."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ecmoe import routers, routing
from ecmoe.config import CHOICES, ConfigError, RunConfig
from ecmoe.model.build import count_parameters, flops_per_token
from ecmoe.routing import build_router
from ecmoe.training.lit import LitModel

# A router of one's own, as README tells


@pytest.fixture
def prototyping(monkeypatch):
    """README's router in a module of its own, and its row; whoever has added it by this name keeps theirs."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- test:(\w+) -->\n```python\n(.*?)```", text, re.DOTALL))
    module = ModuleType("ecmoe.routing.prototyping")
    exec(blocks["router"], vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with patch.dict(routers.ROUTERS):
        exec(blocks["router_row"], {})
        yield module.Prototyping


def test_a_router_is_its_file_and_its_row(prototyping, tiny_config):
    config = tiny_config(router="prototyping", num_experts=4)
    assert config.name.startswith("prototyping-s0-")
    assert RunConfig.from_dict(config.to_dict()) == config
    assert config.replace(num_experts=2).name != config.name and config.replace(top_k=1).name == config.name
    assert isinstance(build_router(config), prototyping)
    one, two = (count_parameters(config.replace(router=r)) for r in ("linear_assignment", "prototyping"))
    expert = 2 * config.d_model * config.d_ff
    assert two.total == one.total and two.active == one.active + expert  # two of four experts
    assert flops_per_token(config) - flops_per_token(config.replace(router="linear_assignment")) == 6 * expert

    lit = LitModel(config)
    optimizer = lit.configure_optimizers()["optimizer"]
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss, aux_loss = lit.losses(tokens)
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert lit.model.moe_layers[0].statistics()["share_2"] == 1


def test_a_row_of_readme_is_true_of_its_class(prototyping):
    test_a_row_is_true_of_its_class("prototyping")


@pytest.mark.parametrize("name", routers.ROUTERS)
def test_a_row_is_true_of_its_class(name):
    """Keys exist, the class is built from them, and an average token is offered what the row says: always, or about so many."""
    row, config = routers.ROUTERS[name], RunConfig(router=name, capacity_factor=2.0, num_experts=8, batch_size=4)
    assert set(row.keys) <= set(config.to_dict())
    if row.layer is None:
        with pytest.raises(ValueError, match="no router"):
            build_router(config)
        return
    router = build_router(config)
    assert type(router) is row.cls and router.num_experts == config.num_experts
    n, offered = 64, []
    ids = torch.arange(n) % 4
    for seed in (0, 1):
        scores = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
        chosen = router.assign(scores, token_ids=ids, task_ids=ids)
        offered.append((chosen.load(n) if chosen.demand is None else chosen.demand).sum() / n)
    said = row.experts_per_token(config.to_dict())
    if row.estimated:
        assert offered[0] != offered[1] and all(abs(number - said) < said / 3 for number in offered)
    else:
        assert offered == [said, said]
    assert row.capacity == (hasattr(router, "capacity_factor") and name != "expert_threshold")


@pytest.mark.parametrize("name", [name for name, row in routers.ROUTERS.items() if row.layer is not None])
def test_a_router_is_built_from_the_keys_that_make_it_another_run_and_no_others(name):
    read, config = set(), RunConfig(router=name)

    class Spy:
        def __getattr__(self, key):
            read.add(key)
            return getattr(config, key)

    build_router(Spy())
    of_routers = {key for row in routers.ROUTERS.values() for key in row.keys}
    assert read & of_routers == set(routers.ROUTERS[name].keys)


def test_a_router_starts_as_a_config_does():
    """An argument's default is that of the key of its name, but for these; an argument of a new router may have no key."""
    told = {
        "ExpertChoice": {"rounding": "exact"},
        "ExpertThreshold": {"beta": 0.999},
        "TokenChoice": {"capacity_factor": None, "bias_rate": 0.001},
        "Hash": {"capacity_factor": None, "token_counts": None},
        "KMeans": {"capacity_factor": None, "beta": 0.99, "seed": 0},
        "TaskLevel": {"table": RunConfig().task_table},
    }
    for row in filter(lambda row: row.layer, routers.ROUTERS.values()):
        signature = inspect.signature(row.cls).parameters.items()
        starts = {name: argument.default for name, argument in signature if argument.default is not argument.empty}
        own = told.get(row.cls.__name__, {})
        assert own.keys() <= starts.keys()
        assert starts == {name: (vars(RunConfig()) | own).get(name, start) for name, start in starts.items()}, row.cls


def test_a_router_says_what_it_is_and_what_it_lacks():
    assert repr(routing.TokenChoice(8, 4, 2, z_loss_weight=0.5)) == (
        "TokenChoice(d_model=8, num_experts=4, top_k=2, gate=softmax, priority=order, aux_loss_weight=0.01, z_loss_weight=0.5, "
        "balance=switch, bias_rate=0.001)"
    )
    assert routing.ExpertChoice(8, 1, 1.0).kernels == "plain"  # until a layer says otherwise
    with pytest.raises(NotImplementedError, match="Router must implement assign"):
        routing.router.Router(8, 4).assign(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="hash_table=balanced needs token_counts"):
        build_router(RunConfig(router="hash", hash_table="balanced"))


@pytest.mark.parametrize("table", CHOICES["hash_table"])
@pytest.mark.parametrize("name", routers.ROUTERS)
def test_a_router_reads_what_its_row_says_beside_the_tokens(name, table):
    """It lacks what it isn't given, and nothing else."""
    config = RunConfig(router=name, hash_table=table)
    if config.row.layer is None:
        assert config.needs == ()
        return
    counts = torch.arange(256) if "token counts" in config.needs else None
    if counts is not None:
        with pytest.raises(ValueError, match="token_counts"):
            build_router(config)
    router, ids = build_router(config, counts), torch.arange(16) % 4
    arguments = {"token ids": "token_ids", "tasks": "task_ids"}
    given = {arguments[need]: ids for need in config.needs if need != "token counts"}
    router.assign(torch.randn(16, 8), **given)
    for lacking in given:
        with pytest.raises(ValueError, match=lacking):
            router.assign(torch.randn(16, 8), **(given | {lacking: None}))


def test_a_table_modulo_needs_no_counts():
    table = build_router(RunConfig(router="hash"), torch.arange(256)).table
    assert table.tolist() == [token % 8 for token in range(256)]


def test_a_bucket_is_rounded_down_and_never_empty():
    assert [routers.bucket_size(n, 4, 1.5, "down") for n in (10, 8, 2, 1)] == [3, 3, 1, 1]
    assert routers.bucket_size(3, 4, 6.0, "down") == 3  # all there are


@pytest.mark.parametrize("n", [3, 9])  # fewer tokens than an expert takes one of, and no whole number
def test_a_short_batch_says_how_to_take_it(n):
    with pytest.raises(
        ConfigError, match=r"outside a RunConfig may round: rounding='down', or altered\(model, rounding='down'\)$"
    ):
        routing.ExpertChoice(8, 8, 2.0).assign(torch.randn(n, 8))
    assert routing.ExpertChoice(8, 8, 2.0, rounding="down").assign(torch.randn(n, 8)).token.shape == (8, max(n // 4, 1))


def test_centroids_start_by_the_runs_seed():
    one, other = (build_router(RunConfig(router="kmeans", seed=seed)).centroids for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "c, message",
    [
        (0, "0.0: must be above 0"),
        (-1.0, "-1.0: must be above 0"),
        (float("nan"), "nan: must be a finite number"),
        (float("inf"), "inf: must be a finite number"),
        ("2", "'2' is of type str, but must be float"),
        (True, "True is of type bool, but must be float"),
    ],
)
@pytest.mark.parametrize(
    "build",
    [
        lambda c: routing.ExpertChoice(8, 4, c),
        lambda c: routing.ExpertThreshold(8, 4, c),
        lambda c: routing.TokenChoice(8, 4, 2, c),
        lambda c: routing.Hash(8, 4, 16, capacity_factor=c),
        lambda c: routing.KMeans(8, 4, capacity_factor=c),
    ],
)
def test_no_router_is_built_with_a_capacity_that_is_none(build, c, message):
    with pytest.raises(ConfigError, match=f"^capacity_factor={message}"):
        build(c)
    assert build(2).capacity_factor == 2
    assert build(np.float64(1.5)).capacity_factor == 1.5  # a number of numpy is one, too
