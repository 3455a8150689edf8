"""Decoding with a cache is the whole pass, token by token, with the same routing."""

import pytest
import torch

from ecmoe import RunConfig, build_model, causal_routing
from ecmoe.model.generate import generate

CONFIG = RunConfig(layers=4, d_model=32, d_ff=48, heads=4, num_experts=4, sequence_length=24, batch_size=4)


def ids(B=4, T=24, seed=0):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(seed))


def warm(config=CONFIG, dtype=torch.float32):
    model = build_model(config).to(dtype)
    model(ids())  # gathers cut-offs
    return model.eval()


def decisions(model):
    """Experts per token of the last forward, by layer."""
    return torch.stack([layer.experts_per_token for layer in model.moe_layers])


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "dense"])
def test_prefill_equals_step_by_step(router):
    model, tokens = warm(CONFIG.replace(router=router)), ids(1, 12, seed=1)
    with causal_routing(model), torch.no_grad():
        whole = model(tokens)
        routed = decisions(model) if model.moe_layers else None
        cache, steps, stepped = [[] for _ in range(4)], [], 0
        for t in range(12):
            steps.append(model(tokens[:, t : t + 1], cache=cache))
            stepped = stepped + (decisions(model) if model.moe_layers else 0)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)
    if routed is not None:
        assert torch.equal(routed, stepped)


def test_chunks_of_any_size_continue_each_other():
    model, tokens = warm(dtype=torch.float64), ids(2, 12, seed=2)
    with causal_routing(model), torch.no_grad():
        cache = [[] for _ in range(4)]
        parts = [model(part, cache=cache) for part in tokens.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-12, rtol=0)


def test_greedy_takes_the_most_likely_and_a_batch_of_one_works():
    model, prompt = warm(), ids(1, 3)
    out = generate(model, prompt, 4, temperature=0)
    assert out.shape == (1, 7) and torch.equal(out[:, :3], prompt)
    with causal_routing(model), torch.no_grad():
        assert torch.equal(model(out[:, :-1])[:, 2:].argmax(-1), out[:, 3:])


def test_the_other_prompts_of_a_batch_change_nothing():
    model, prompts = warm(dtype=torch.float64), ids(3, 4)
    together = generate(model, prompts, 5, temperature=0)
    assert all(torch.equal(generate(model, prompts[i : i + 1], 5, temperature=0)[0], together[i]) for i in range(3))


def test_sampling_repeats_with_its_seed_and_keeps_to_top_k():
    model, prompt = warm(), ids(2, 4)
    a, b, c = (generate(model, prompt, 8, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(generate(model, prompt, 8, top_k=1), generate(model, prompt, 8, temperature=0))
    assert torch.equal(generate(model, prompt, 8, seed=1, top_k=1000), a)  # of 256


def test_a_token_is_drawn_from_the_softmax_of_the_k_largest_logits_over_the_temperature():
    model, prompts = warm(), ids(64, 3)
    with causal_routing(model), torch.no_grad():
        logits = model(prompts)[:, -1] / 0.3
    kept = logits.masked_fill(logits < logits.sort(dim=1).values[:, -5:-4], -torch.inf)
    drawn = torch.multinomial(kept.softmax(1), 1, generator=torch.Generator().manual_seed(9))
    assert torch.equal(generate(model, prompts, 1, temperature=0.3, top_k=5, seed=9)[:, -1:], drawn)


def test_where_nothing_is_asked_for_a_token_is_drawn_from_the_softmax_itself():
    model, prompts = warm(), ids(64, 3)
    with causal_routing(model), torch.no_grad():
        p = model(prompts)[:, -1].softmax(1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(model, prompts, 1)[:, -1:], drawn)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_routing_come_back(training):
    model = warm().train(training)
    generate(model, ids(1, 2), 1)
    assert model.training == training and not model.moe_layers[0].router.causal
    with pytest.raises(IndexError):
        generate(model, torch.full((1, 2), 10**6), 1)
    assert model.training == training and not model.moe_layers[0].router.causal


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": torch.zeros(1, 0, dtype=torch.long)},
        {"prompt": torch.zeros(3, dtype=torch.long)},
        {"temperature": -1.0},
        {"top_k": 0},
        {"tokens": -1},
    ],
)
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match="|".join(bad)):
        generate(**({"model": warm(), "prompt": ids(1, 2), "tokens": 1} | bad))


def test_drawing_tokens_leaves_others_random_numbers_alone():
    model, before = warm(), torch.get_rng_state()
    generate(model, ids(1, 2), 3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_given_is_repeated_in_the_error():
    model = warm()
    with pytest.raises(ValueError, match=r"^prompt has shape \(3, 0\): must be \(B, T\) with at least one token$"):
        generate(model, torch.zeros(3, 0, dtype=torch.long), 1)
    with pytest.raises(
        ValueError, match=r"^tokens=7, temperature=0.5, top_k=-2: must not be negative; top_k at least 1$"
    ):
        generate(model, ids(1, 2), 7, temperature=0.5, top_k=-2)


def test_nothing_is_added_where_nothing_is_asked_for():
    model = warm().train()
    assert torch.equal(generate(model, ids(1), 0), ids(1)) and model.training  # as it was


def test_an_untrained_router_has_no_cutoffs():
    model = build_model(CONFIG).train()
    with pytest.raises(ValueError, match="seen no training batch"):
        generate(model, ids(1, 2), 1)
    assert model.training


def test_a_model_in_training_generates_in_evaluation_and_goes_on_training():
    model, seen = warm().train(), []
    model.register_forward_pre_hook(lambda model, _: seen.append(model.training))
    generate(model, ids(1, 5), 3)
    assert seen == [False] * 3 and model.training
