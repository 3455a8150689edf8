"""Task-level routing: a task's experts by a plain loop, and the gradient of a learned table."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmoe import MoE
from ecmoe.routing import TaskLevel
from tests.routing.problems import alone, check, problems, random_logits, same_choice, two_hundred

D, TASKS = 3, 10


def loop(router, tasks, e: int) -> torch.Tensor:
    """(n, e) weights, a token at a time."""
    out = np.zeros((len(tasks), e))
    for place, task in enumerate(tasks):
        if router.kind == "fixed":
            out[place, task % e] = 1
        else:
            z = np.exp(router.table[task].detach().numpy())
            out[place, z.argmax()] = z.max() / z.sum()
    return torch.from_numpy(out)


@two_hundred
@given(problems(), st.sampled_from(["learned", "fixed"]))
def test_200_problems(problem, table):
    n, e = problem.logits.shape
    torch.manual_seed(n)
    router = TaskLevel(D, e, TASKS, table).double()
    chosen = router.assign(problem.logits, task_ids=problem.ids, mask=problem.mask)
    found = check(chosen, problem)
    valid = problem.ids[problem.valid]
    assert len(found) == chosen.demand.sum() == len(valid)  # nothing is dropped
    same_choice(alone(chosen, problem), loop(router, valid.tolist(), e))
    unmasked = router.assign(problem.logits[problem.valid], task_ids=valid)
    same_choice(alone(chosen, problem), unmasked.dense(len(valid)))


def test_by_hand():
    router = TaskLevel(D, 2, 3, "fixed")  # task 0: expert 0; 1: expert 1; 2: expert 0
    chosen = router.assign(torch.zeros(4, 2), task_ids=torch.tensor([1, 0, 2, 1]))
    assert chosen.dense(4).tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]


def test_a_learned_table_starts_with_its_tasks_apart():
    """Scores ~ N(0, 1 / tasks), and gates of the dtype of the scores that a layer computes."""
    router = TaskLevel(D, 400, 9)
    assert router.table.std().item() == pytest.approx(9**-0.5, rel=0.05)
    wide = torch.zeros(4, 400, dtype=torch.float64)
    for table in ("learned", "fixed"):
        assert TaskLevel(D, 400, 9, table).assign(wide, task_ids=torch.arange(4)).gate.dtype == torch.float64


def test_a_table_in_16_bits_chooses_as_its_numbers_say():
    """Its scores would tie where they are computed in 16 bits, too."""
    torch.manual_seed(0)
    router = TaskLevel(D, 64, 2000).bfloat16()
    chosen = router.assign(torch.zeros(2000, 64), task_ids=torch.arange(2000)).dense(2000)
    assert torch.equal(chosen.argmax(1), router.table.argmax(1))


@pytest.mark.parametrize("table", ["learned", "fixed"])
def test_other_tokens_and_the_input_do_not_matter_in_training_or_evaluation(table):
    router, tasks = TaskLevel(D, 4, TASKS, table), torch.arange(TASKS)
    both = router.assign(random_logits(10, 4, 0), task_ids=tasks).dense(10)
    assert torch.equal(router.eval().assign(random_logits(10, 4, 1), task_ids=tasks).dense(10), both)
    one = router.assign(random_logits(1, 4, 2), task_ids=tasks[3:4]).dense(1)
    assert torch.equal(one[0], both[3])


def test_a_layer_serves_a_sequence_by_its_task_alone():
    torch.manual_seed(0)
    moe = MoE(TaskLevel(D, 4, 4, "fixed"), D, 5).double()
    x = torch.randn(2, 6, D, dtype=torch.float64)
    out = moe(x, task_ids=torch.tensor([2, 0]))  # one task a sequence
    for sequence, expert in [(0, 2), (1, 0)]:
        h = torch.nn.functional.gelu(x[sequence] @ moe.w1[expert], approximate="tanh")
        torch.testing.assert_close(out[sequence], h @ moe.w2[expert])
    out.sum().backward()
    unused = moe.w1.grad[[1, 3]]
    assert (unused == 0).all() and (moe.w1.grad[[0, 2]] != 0).all()


def test_gradient_of_a_learned_table_is_that_of_the_softmax():
    torch.manual_seed(0)
    router = TaskLevel(D, 4, 3).double()
    tasks, weights = torch.tensor([2, 0, 2]), torch.randn(3, 4, dtype=torch.float64)
    chosen = router.assign(random_logits(3, 4, 0), task_ids=tasks).dense(3)
    p = router.table.softmax(1)
    top = torch.zeros_like(p).scatter(1, p.topk(1, 1).indices, 1.0)
    expected = torch.autograd.grad(((p * top)[tasks] * weights).sum(), router.table)[0]
    ours = torch.autograd.grad((chosen * weights).sum(), router.table)[0]
    torch.testing.assert_close(ours, expected)
    assert (ours[1] == 0).all() and (ours[[0, 2]] != 0).any()  # task 1 wasn't there


@pytest.mark.parametrize("table", ["learned", "fixed"])
def test_the_table_survives_a_checkpoint(table):
    torch.manual_seed(0)
    router, loaded = TaskLevel(D, 4, 3, table), TaskLevel(D, 4, 3, table)
    loaded.load_state_dict(router.state_dict())
    assert torch.equal(loaded.table, router.table) and len(router.state_dict()) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TaskLevel(D, 4, 0), "num_tasks=0"),
        (lambda: TaskLevel(D, 4, -1), "num_tasks=-1: must be at least 1"),
        (lambda: TaskLevel(D, 4, 2, "random"), "table='random'.*learned, fixed"),
        (lambda: TaskLevel(D, 4, 2).assign(torch.zeros(3, 4)), "needs task_ids"),
        (
            lambda: TaskLevel(D, 4, 2).assign(torch.zeros(1, 4), task_ids=torch.tensor([2])),
            r"task_ids has 2: must lie in 0\.\.1",
        ),
    ],
)
def test_errors_name_key_value_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
