"""The router's kernels: logits to float32's precision, the k highest."""

import pytest
import torch

from ecmoe import kernels
from ecmoe.kernels import choice, routing, selection
from tests.kernels.oracle import DEVICE, distance, spoil_new_memory


@pytest.mark.parametrize(("m", "k"), [(64, 8), (100, 33), (7, 7), (1, 1), (9000, 300), (9000, 8999), (20_000, 600)])
def test_select_takes_the_k_highest(m, k):
    scores = torch.randn(3, m, generator=torch.Generator().manual_seed(m)).to(DEVICE)
    chosen = kernels.select(scores, k)
    assert torch.equal(chosen, scores.topk(k).indices.sort().values) and chosen.is_contiguous()


def test_select_takes_the_k_highest_of_two_blocks_of_whole_numbers():
    """Whose last bits are 0: the search meets scores that equal its bounds, in the second block too."""
    dice = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(10_000, generator=dice)[:6000] for _ in range(24)]).float().to(DEVICE)
    for k in (500, 1001, 3002):
        assert torch.equal(kernels.select(scores, k), scores.topk(k).indices.sort().values)


def test_select_counts_a_last_score_that_is_in_a_block_of_its_own():
    """Of 4097 scores, as a block holds 4096: the last is the highest, between the others, and the lowest."""
    scores = torch.rand(3, 4097, generator=torch.Generator().manual_seed(0))
    scores[:, -1] = torch.tensor([2.0, 0.5, -1.0])
    for k in (1, 2100, 4096):
        expected = scores.topk(k).indices.sort().values
        assert torch.equal(kernels.select(scores.to(DEVICE), k).cpu(), expected)
    alike = torch.full((2, 4097), 0x3F000003, dtype=torch.int32).view(torch.float32)  # but for the last
    alike[:, -1] = torch.tensor([2.0, -1.0])
    assert kernels.select(alike.to(DEVICE), 2).tolist() == [[0, 4096], [0, 1]]


@pytest.mark.parametrize("kind", ["rising", "few values", "periodic", "one high"])
def test_select_is_right_where_its_sample_misleads(kind):
    m, k = 12_000, 500
    place = torch.arange(m)
    scores = {
        "rising": place.float(),
        "few values": (place % 3).float(),
        "periodic": (place % (m // selection.SAMPLE) == 0).float() + place / m,  # the sample sees only high ones
        "one high": (place == 7).float(),
    }[kind]
    expected = scores.argsort(descending=True, stable=True)[:k].sort().values
    assert torch.equal(kernels.select(scores.to(DEVICE), k).cpu(), expected)


def test_the_search_takes_blocks_as_large_as_the_list_that_it_expects(monkeypatch):
    """Smaller ones wait less for each other; the whole row takes several."""
    taken, launch = [], selection._take_kernel.launch
    monkeypatch.setattr(selection._take_kernel, "launch", lambda *a, **k: taken.append(k["BLOCK"]) or launch(*a, **k))
    for m, k in ((64, 8), (9_000, 1), (16_384, 512), (16_384, 1024), (65_536, 2048), (9_000, 8_000)):
        scores = torch.randn(2, m, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        assert torch.equal(kernels.select(scores, k), scores.topk(k).indices.sort().values)
    assert taken == [64, 1024, 1024, 2048, 4096, 4096]


def test_select_and_logits_read_nothing_that_nobody_has_written(monkeypatch):
    g = torch.Generator().manual_seed(0)
    scores, x, w, gradient = (
        torch.randn(*s, generator=g).to(DEVICE) for s in ((3, 9000), (130, 70), (70, 17), (130, 17))
    )
    wanted, found = [t.requires_grad_() for t in (x, w)], []
    for spoiled in (False, True):
        if spoiled:
            spoil_new_memory(monkeypatch)
        out, _ = kernels.logits(*wanted)
        found.append((kernels.select(scores, 300), out, *torch.autograd.grad(out, wanted, gradient)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_select_orders_all_float32_numbers():
    tiny = torch.finfo(torch.float32).tiny
    values = [
        float("inf"),
        1e38,
        2.0,
        1.0000001,
        1.0,
        tiny,
        tiny / 4,
        1e-45,
        0.0,
        -1e-45,
        -tiny,
        -1.0,
        -3e38,
        float("-inf"),
    ]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    values = torch.tensor(values)
    scores = values[order].to(DEVICE)
    for k in range(1, len(values) + 1):
        assert scores[kernels.select(scores, k)].sort(descending=True).values.tolist() == values[:k].tolist()
    scores[3] = float("nan")
    assert kernels.select(scores, 1).tolist() == [3]  # as topk's


def test_of_equal_scores_the_first_are_taken():
    scores = torch.tensor([[0.0, -0.0, 0.0, 1.0, 0.0, -0.0], [2.0] * 6, [1, 3, 1, 3, 1, 3.0]], device=DEVICE)
    assert kernels.select(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2], [1, 3, 5]]
    assert kernels.select(scores, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 5]]
    last = torch.arange(300) % 16  # bits, each as often the last that decides
    scores = (0x3F000000 + last).int().view(torch.float32)
    for k in range(9, 300, 19):
        expected = scores.argsort(descending=True, stable=True)[:k].sort().values
        assert torch.equal(kernels.select(scores[None].to(DEVICE), k)[0].cpu(), expected)


def test_other_types_are_selected_in_topks_order():
    scores = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(kernels.select(scores, 5), scores.topk(5).indices)
    assert not torch.equal(kernels.select(scores.float(), 5), scores.topk(5).indices)


def test_select_takes_pools_and_softmax_scores():
    scores = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0)).to(DEVICE).softmax(1)
    chosen = kernels.select(scores.transpose(0, 1), 7).transpose(0, 1)
    assert torch.equal(chosen, scores.topk(7).indices.sort().values)
    of_one = scores[0].T.contiguous().T  # as the router leaves them, whose softmax is over the experts
    assert not of_one.is_contiguous() and torch.equal(kernels.select(of_one, 7), chosen[0])


def test_a_choice_writes_down_what_it_is_given_room_for():
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    inverse, pending, pools = (
        torch.full((40, 3), 15, dtype=torch.int32),
        torch.tensor([10.0, 20.0, 30.0]),
        torch.tensor(2.0),
    )
    bins = torch.full((16,), 7)
    mine = [t.clone().to(DEVICE) for t in (inverse, pending, pools, bins)]
    chosen = selection.choose(scores.to(DEVICE), 5, mine[0], (mine[1], mine[2]), mine[3][:9]).cpu()
    assert torch.equal(chosen, scores.topk(5).indices.sort().values)
    for row in range(3):
        inverse[chosen[row], row] = 5 * row + torch.arange(5, dtype=torch.int32)
    lowest = scores.topk(5).values.min(1).values
    for found, expected in zip(
        mine, (inverse, pending + lowest, pools + 1, torch.tensor(9 * [0] + 7 * [7])), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected)


def test_statistics_of_a_layer_stay_within_their_room():
    """Of three experts, in kernels that reckon with four; of which tokens have at most two."""
    x, weight, w1, w2 = (torch.randn(*s, device=DEVICE) for s in ((20, 8), (8, 3), (3, 8, 16), (3, 16, 8)))
    room = [torch.full((size,), -1, device=DEVICE) for size in (8, 8, 2, 16)]
    choice.expert_choice(x, weight, w1, w2, 10, statistics=[t[:n] for t, n in zip(room, (3, 3, 1, 3), strict=True)])
    got = torch.zeros(20, dtype=torch.long, device=DEVICE)
    for best in (x @ weight).softmax(1).T.topk(10).indices:
        got[best] += 1
    bins = got.clamp(max=2).bincount(minlength=3).tolist()
    assert [t.tolist() for t in room] == [3 * [10] + 5 * [-1], 3 * [10] + 5 * [-1], [20, -1], bins + 13 * [-1]]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "e"), [(40, 24, 6), (130, 70, 17), (1, 1, 1)])
def test_logits_are_float32s(n, d, e, dtype, narrow, monkeypatch):
    monkeypatch.setattr(routing, "TOKENS_PER_SUM", 32)  # 130 tokens are five partial sums
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g).to(DEVICE, dtype).requires_grad_()
    w = torch.randn(d, e, generator=g).to(DEVICE, torch.bfloat16 if narrow else torch.float32).requires_grad_()
    gradient = torch.randn(n, e, generator=g).to(DEVICE)
    (out, again), expected = kernels.logits(x, w), x.double() @ w.double()
    assert torch.equal(again, x) and again.dtype == dtype
    assert out.dtype == torch.float32 and distance(out, expected) < 2e-6
    (dx, dw), theirs = (torch.autograd.grad(o, [x, w], gradient.to(o.dtype)) for o in (out, expected))
    assert dx.dtype == dtype and distance(dx, theirs[0]) < (2**-6 if dtype == torch.bfloat16 else 2e-6)
    assert dw.dtype == w.dtype and distance(dw, theirs[1]) < (2**-6 if narrow else 2e-6)


@pytest.mark.parametrize(("dtype", "e"), [(torch.float16, 6), (torch.bfloat16, routing.MOST_EXPERTS + 1)])
def test_logits_are_float32s_also_where_no_kernel_makes_them(dtype, e):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, generator=g).to(DEVICE, dtype) for size in ((40, 24), (24, e)))
    out, _ = kernels.logits(x, w)
    assert out.dtype == torch.float32 and distance(out, x.double() @ w.double()) < 2e-6


def test_the_two_gradients_of_a_token_add_up():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=g).to(DEVICE).requires_grad_()
    w = torch.randn(24, 6, generator=g).to(DEVICE)
    out, again = kernels.logits(x, w)
    assert torch.equal(again, x)
    (ours,) = torch.autograd.grad(out.square().sum() + again.sin().sum(), x)
    (theirs,) = torch.autograd.grad((x @ w).square().sum() + x.sin().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (alone,) = torch.autograd.grad(kernels.logits(x, w)[0].square().sum(), x)
    torch.testing.assert_close(alone, ours - x.cos(), rtol=1e-4, atol=1e-4)


def test_logits_of_other_types_and_of_more_experts_are_the_plain_product(monkeypatch):
    monkeypatch.setattr(routing._Logits, "apply", lambda x, w: (None, x))
    for dtype, e, wide in (
        (torch.float64, 3, torch.float64),
        (torch.float16, 3, torch.float32),
        (torch.float32, 129, torch.float32),
    ):
        x, w = torch.randn(5, 4, device=DEVICE).to(dtype), torch.randn(4, e, device=DEVICE)
        out, same = kernels.logits(x, w)
        assert out.dtype == wide and torch.equal(out, x.to(wide) @ w.to(wide)) and same is x
    for dtype in (torch.float32, torch.bfloat16):
        assert kernels.logits(x[:, :3].to(dtype), torch.randn(3, 128, device=DEVICE))[0] is None


def test_logits_and_gradients_are_the_same_in_any_layout():
    g = torch.Generator().manual_seed(0)
    x, w, gradient = (torch.randn(*s, generator=g).to(DEVICE) for s in ((40, 24), (24, 6), (40, 6)))
    found = []
    for order in (lambda t: t, lambda t: t.T.contiguous().T):
        mine = [order(t).requires_grad_() for t in (x, w)]
        out, again = kernels.logits(*mine)
        gradients = order(gradient), order(gradient @ w.T)
        found.append((out, *torch.autograd.grad([out, again], mine, gradients)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_scores_are_a_softmax_laid_out_as_experts_choose():
    x, w = (torch.randn(*s, generator=torch.Generator().manual_seed(0)).to(DEVICE) for s in ((130, 70), (70, 17)))
    inverse = torch.zeros(130, 17, dtype=torch.int32, device=DEVICE)
    scores = routing.product(30 * x, w, inverse, 99)  # of logits that float32's exp can't take
    assert (inverse == 99).all() and scores.shape == (17, 130)
    torch.testing.assert_close(scores.double(), (30 * x.double() @ w.double()).softmax(1).T, atol=1e-3, rtol=0)


def test_who_may_have_a_layer_at_once():
    def may(n=8, e=3, k=2, x=torch.float32, weight=torch.float32):
        return choice.available(
            torch.empty(n, 4, dtype=x, device="meta"), torch.empty(4, e, dtype=weight, device="meta"), k
        )

    assert may() and may(x=torch.bfloat16) and may(weight=torch.bfloat16)
    assert not may(x=torch.float64) and not may(weight=torch.float64) and not may(x=torch.float16)
    assert [may(k=k) for k in (0, 1, 7, 8)] == [False, True, True, False]  # else nothing is chosen
    assert may(e=128) and not may(e=129) and may((1 << 21) - 1) and not may(1 << 21)


def test_routing_operators_say_their_shapes():
    x, w = (
        torch.randn(20, 8, device=DEVICE).bfloat16().requires_grad_(),
        torch.randn(8, 5, device=DEVICE).requires_grad_(),
    )
    tests = "test_schema", "test_faketensor"
    dlogits, dx = torch.randn(20, 5, device=DEVICE), torch.randn_like(x)
    torch.library.opcheck(torch.ops.ecmoe.logits, (x.detach(), w.detach()), test_utils=tests)
    given = (dlogits, dx, x.detach(), w.detach())
    torch.library.opcheck(torch.ops.ecmoe.logits_backward, given, test_utils=tests)
    torch.library.opcheck(torch.ops.ecmoe.select, (w.detach(), 3), test_utils=tests)
