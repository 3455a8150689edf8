"""Routing makes what it needs where the tokens are, wherever else new tensors go."""

import pytest
import torch

from ecmoe import MoE
from ecmoe.routing import (
    Dense,
    ExpertChoice,
    ExpertThreshold,
    Hash,
    KMeans,
    LinearAssignment,
    TaskLevel,
    TokenChoice,
    causal_routing,
)

D, E, N = 3, 4, 16
ROUTERS = {
    "dense": lambda: Dense(D, E),
    "batch": lambda: ExpertChoice(D, E),
    "sequence": lambda: ExpertChoice(D, E, pool="sequence", gate="renormalized"),
    "tokens": lambda: ExpertChoice(D, E, pool=8, rounding="down"),
    "capped": lambda: ExpertChoice(D, E, max_experts_per_token=2),
    "dykstra": lambda: ExpertChoice(D, E, max_experts_per_token=2, cap_solver="dykstra"),
    "threshold": lambda: ExpertThreshold(D, E),
    "hash": lambda: Hash(D, E, 10, 1.0),
    "k-means": lambda: KMeans(D, E, 1.0),
    "auction": lambda: LinearAssignment(D, E),
    "auction of one": lambda: LinearAssignment(D, 1),
    "learned task": lambda: TaskLevel(D, E, 5),
    "fixed task": lambda: TaskLevel(D, E, 5, "fixed"),
    **{
        balance: lambda balance=balance, priority=priority: TokenChoice(
            D, E, 2, 1.0, "softmax", priority, balance=balance
        )
        for balance, priority in (
            ("switch", "score"),
            ("first_choice", "order"),
            ("importance_load", "score"),
            ("bias", "order"),
        )
    },
}


@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_made_lies_where_the_tokens_are(name):
    """Who forgets `device=` gets a tensor without numbers here, as it would be one on a CPU beside a GPU's."""
    draw = torch.Generator().manual_seed(0)
    x, mask = torch.randn(2, N // 2, D, generator=draw), torch.rand(N, generator=draw) < 0.7
    ids = torch.randint(5, (N,), generator=draw)

    def routed(place):
        router, found = ROUTERS[name](), []
        router.load_state_dict({key: value.detach().clone() for key, value in state.items()})

        def choose():
            torch.manual_seed(0)
            for m in (None, mask):
                chosen = router.assign(router.logits(x), batch_shape=x.shape[:2], token_ids=ids, task_ids=ids, mask=m)
                found.extend([*chosen, chosen.aux_loss, chosen.dense(N), chosen.renormalized(N).gate])
                found.append(chosen.experts_per_token(N))

        with place:
            choose()
            router.end_step()
            choose()
            with causal_routing(router):
                choose()
        return [one for one in [*found, *router.buffers()] if one is not None]

    state = ROUTERS[name]().state_dict()
    for there, here in zip(*map(routed, map(torch.device, ("cpu", "meta"))), strict=True):
        assert torch.equal(there, here)


@pytest.mark.parametrize(
    ("make", "static"),
    [
        (lambda: Dense(D, E), True), (lambda: ExpertChoice(D, E), True), (lambda: ExpertThreshold(D, E), True),
        (lambda: Hash(D, E, 10, 1.0), True), (lambda: Hash(D, E, 10), False),
        (lambda: TokenChoice(D, E, 1, 1.0), True), (lambda: TokenChoice(D, E, 1), False),
    ],
)  # fmt: skip
def test_static_is_who_needs_no_number_from_the_device(make, static):
    """On one that has none to give, choosing in training works or not."""
    router, ids = make().to("meta"), torch.zeros(N, dtype=torch.long, device="meta")
    logits = torch.zeros(N, E, device="meta")
    try:
        router.assign(logits, batch_shape=(2, N // 2), token_ids=ids)
        works = True
    except (RuntimeError, NotImplementedError):
        works = False
    assert router.static == works == static


@pytest.mark.parametrize("name", [*ROUTERS, "balanced hash"])
def test_reset_gives_a_router_without_memory_the_state_that_its_constructor_gives(name):
    """Large models are made so: on the meta device, then `to_empty`, whose memory may hold anything."""
    counts = torch.tensor([1, 7, 4, 9, 5])
    make = (ROUTERS | {"balanced hash": lambda: Hash(D, E, 5, 1.0, counts)})[name]
    with torch.device("meta"):
        router = make()
    router.to_empty(device="cpu")
    for value in router.state_dict().values():
        value.fill_(7)
    torch.manual_seed(0)
    for module in router.modules():
        module.reset_parameters()
    torch.manual_seed(0)
    expected = make().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in router.state_dict().items())


@pytest.mark.parametrize("name", ROUTERS)
def test_running_statistics_are_in_float32_at_least_whatever_the_default(name):
    before = torch.get_default_dtype()
    try:
        for default, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            torch.set_default_dtype(default)
            found = {buffer.dtype for buffer in ROUTERS[name]().buffers()}
            assert found <= {expected, torch.long}
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("learned task", "fixed task")])
def test_a_layer_computes_shapes_on_the_meta_device(name):
    moe = MoE(ROUTERS[name](), D, 5).to("meta")
    x, ids = torch.empty(2, N // 2, D, device="meta"), torch.empty(2, N // 2, dtype=torch.long, device="meta")
    assert moe(x, token_ids=ids).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_ids_of_narrow_types_are_ids_and_no_masks(dtype):
    ids = (torch.arange(N) % 2).to(dtype)
    for router in (Hash(D, E, 10), TaskLevel(D, E, 5), TaskLevel(D, E, 5, "fixed")):
        logits = torch.zeros(N, E)
        narrow = router.assign(logits, token_ids=ids, task_ids=ids)
        wide = router.assign(logits, token_ids=ids.long(), task_ids=ids.long())
        assert torch.equal(narrow.dense(N), wide.dense(N)) and narrow.load(N).sum() == N
