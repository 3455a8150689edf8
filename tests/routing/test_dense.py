"""Dense mixture: all experts on all tokens, against an einsum over experts and a plain FFN."""

import torch
from hypothesis import given
from torch.nn import functional as F

from ecmoe import MoE
from ecmoe.routing import Dense, ExpertChoice
from tests.routing.problems import alone, check, demand, problems, random_logits, same_choice, two_hundred

D, HIDDEN = 3, 5


@two_hundred
@given(problems())
def test_200_problems(problem):
    n, e = problem.logits.shape
    router = Dense(D, e)
    chosen = router.assign(problem.logits, mask=problem.mask)
    found = check(chosen, problem)
    n_valid = int(problem.valid.sum())
    assert demand(chosen, n) == [n_valid] * e and len(found) == n_valid * e  # nothing is dropped
    Z = problem.logits[problem.valid].exp()
    same_choice(alone(chosen, problem), Z / Z.sum(1, keepdim=True))
    unmasked = router.assign(problem.logits[problem.valid])
    same_choice(alone(chosen, problem), unmasked.dense(n_valid))


def test_the_layer_is_the_einsum_over_experts():
    torch.manual_seed(0)
    moe = MoE(Dense(D, 4), D, HIDDEN).double()
    x = torch.randn(2, 7, D, dtype=torch.float64)
    p = (x @ moe.router.weight).softmax(-1)
    h = F.gelu(torch.einsum("btd,edf->btef", x, moe.w1), approximate="tanh")
    expected = torch.einsum("bte,btef,efd->btd", p, h, moe.w2)
    torch.testing.assert_close(moe(x), expected)

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), list(moe.parameters()))

    for ours, theirs in zip(gradients(moe(x)), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert gradients(moe(x))[0].abs().max() > 0  # the router learns


def test_one_expert_is_a_dense_ffn():
    torch.manual_seed(0)
    moe = MoE(Dense(D, 1), D, HIDDEN).double()
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(moe(x), F.gelu(x @ moe.w1[0], approximate="tanh") @ moe.w2[0])


def test_it_is_expert_choice_with_c_equal_to_e():
    logits = random_logits(6, 4, 0)
    everyone = ExpertChoice(D, 4, 4.0).assign(logits)
    same_choice(Dense(D, 4).assign(logits).dense(6), everyone.dense(6))
