"""RunningCutoff: a bias-corrected moving average over optimiser steps, whatever the micro-batches and ranks."""

import pytest
import torch

from ecmoe.routing.cutoff import RunningCutoff
from tests.routing.problems import generator

E = 3
STEPS = torch.rand(6, 4, E, generator=generator(0))  # 6 steps, 4 pools each


def run(micro_batches: int, beta: float = 0.9) -> RunningCutoff:
    cutoff = RunningCutoff(E, beta)
    for step in STEPS:
        for part in step.chunk(micro_batches):
            cutoff.add(part)
        cutoff.end_step()
    return cutoff


def loop_average(beta: float) -> torch.Tensor:
    average = torch.zeros(E, dtype=torch.float64)
    for step in STEPS:
        average = beta * average + (1 - beta) * step.double().mean(0)
    return (average / (1 - beta ** len(STEPS))).float()


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_one_update_a_step_also_under_accumulation(beta, micro_batches):
    torch.testing.assert_close(run(micro_batches, beta).value(), loop_average(beta))


def test_the_first_step_is_its_mean_and_counts_before_it_ends():
    cutoff = RunningCutoff(E, 0.999)
    assert cutoff.empty()
    cutoff.add(STEPS[0])
    assert not cutoff.empty()
    torch.testing.assert_close(cutoff.value(), STEPS[0].mean(0))
    cutoff.end_step()
    torch.testing.assert_close(cutoff.value(), STEPS[0].mean(0))


def test_what_a_step_has_added_counts_before_it_ends():
    cutoff, ended = run(1), run(1)
    for c in (cutoff, ended):
        c.add(STEPS[2][:1])
        c.add(STEPS[3])
    ended.end_step()
    torch.testing.assert_close(cutoff.value(), ended.value())
    assert not torch.allclose(cutoff.value(), run(1).value())


def test_a_pool_without_a_score_counts_for_nothing():
    cutoff, of_two = RunningCutoff(E, 0.9), RunningCutoff(E, 0.9)
    cutoff.add(torch.stack([STEPS[0][0], torch.full((E,), torch.nan), STEPS[0][1]]), torch.tensor([True, False, True]))
    of_two.add(STEPS[0][:2])
    assert torch.equal(cutoff.pending, of_two.pending) and cutoff.count == of_two.count == 2
    cutoff, before = run(1), run(1).value()
    cutoff.add(STEPS[1][:1], torch.tensor([False]))
    assert not cutoff.end_step() and torch.equal(cutoff.value(), before)


def test_a_step_without_batches_moves_nothing():
    cutoff = run(1)
    before = cutoff.value()
    cutoff.end_step()
    assert torch.equal(cutoff.value(), before)


def test_state_survives_a_checkpoint_in_the_middle_of_a_step():
    cutoff = run(2)
    cutoff.add(STEPS[0])
    loaded = RunningCutoff(E, 0.9)
    loaded.load_state_dict(cutoff.state_dict())
    for c in (cutoff, loaded):
        c.add(STEPS[1])
        c.end_step()
    assert torch.equal(loaded.value(), cutoff.value())


def test_two_ranks_are_one_batch(two_ranks):
    def work(rank: int) -> list[float]:
        cutoff = RunningCutoff(E, 0.9)
        for step in STEPS:
            cutoff.add(step.chunk(2)[rank])
            cutoff.end_step()
        return cutoff.value().tolist()

    first, second = two_ranks(work)
    assert first == second
    torch.testing.assert_close(torch.tensor(first), loop_average(0.9))


@pytest.mark.parametrize("beta", [1.0, -0.1])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=f"beta={beta}.*below 1"):
        RunningCutoff(E, beta)


def test_a_cast_to_16_bits_leaves_the_average_what_it_is():
    narrow, wide = RunningCutoff(E, 0.999).to(torch.bfloat16), RunningCutoff(E, 0.999)
    for _ in range(50):
        for cutoff in (narrow, wide):
            cutoff.add(STEPS[0])
            cutoff.end_step()
    assert torch.equal(narrow.value(), wide.value()) and narrow.weight > 0.04
    moved = wide.to(torch.bfloat16)
    assert torch.equal(moved.average, narrow.average) and moved.average.dtype == torch.float32
    moved.register_buffer("absent", None)
    assert moved.double().average.dtype == torch.float64 and moved.float().average.dtype == torch.float32
    assert moved.to("meta").average.is_meta


def test_one_expert_that_is_no_number_moves_none():
    cutoff = run(1)
    before = cutoff.value()
    cutoff.add(torch.tensor([[float("nan"), 0.5, 0.5]]))
    assert not cutoff.end_step() and torch.equal(cutoff.value(), before)
    fresh = RunningCutoff(E, 0.9)
    fresh.add(torch.tensor([[float("nan"), 0.5, 0.5]]))
    assert fresh.empty()  # nothing can be routed by it
