"""The leak's measures against oracles: information that is known, routings whose dependence is known, loops by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from ecmoe import RunConfig, build_model, causal_routing, run_or_load
from ecmoe.measures import causality, probe
from ecmoe.measures.inspection import held_out
from ecmoe.measures.probe import information
from ecmoe.routing import ExpertChoice, altered

N, T, C = 300, 20, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def targets():
    """Tokens of which each is the one before it plus 0, 1 or 2, with probabilities .5, .25, .25 (mod 4)."""
    steps = torch.tensor([0, 0, 1, 2])[torch.randint(4, (N, T + 1), generator=generator())]
    ids = steps.cumsum(1) % C
    return ids[:, :-1], ids[:, 1:]


def uniform(target):
    return torch.full((*target.shape, C), -math.log(C))


# The probe


def test_random_features_hold_nothing_and_are_not_clipped(targets):
    _, target = targets
    bits = [
        information(uniform(target), {"x": torch.rand(N, T, 3, generator=generator(s))}, target)["x"] for s in range(6)
    ]
    assert all(abs(b) < 0.01 for b in bits) and min(bits) < 0


def test_a_feature_that_is_the_target_holds_all_of_it(targets):
    _, target = targets
    found = information(uniform(target), {"target": F.one_hot(target, C), "noise": torch.zeros(N, T, 1)}, target)
    assert found["target"] == pytest.approx(2.0, abs=0.15) and abs(found["noise"]) < 1e-6


def test_what_is_known_already_is_not_counted_again(targets):
    current, target = targets
    routing = {"routing": F.one_hot(current % 3, 3)}  # a function of the current token alone
    step = torch.tensor([0.5, 0.25, 0.25, 1e-9]).log()
    bigram = torch.stack([step.roll(shift) for shift in range(C)])
    assert information(uniform(target), routing, target)["routing"] > 0.2
    assert abs(information(bigram[current], routing, target)["routing"]) < 0.01
    # The current token tells 0.5 bits of 2: its entropy is 1.5.
    told = information(uniform(target), {"token": F.one_hot(current, C)}, target)["token"]
    assert told == pytest.approx(0.5, abs=0.03)


def test_features_are_scaled_by_what_trains():
    x = torch.randn(20, 8, 3, generator=generator(0)) * 5 + 2
    x[..., 1] /= 1000
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))  # always the same
    sequences = torch.arange(20)[:, None].expand(20, 8)
    train, select, score = probe._parts(x, x, sequences)
    assert torch.equal(torch.cat([train.target, select.target, score.target]), order.repeat_interleave(8))
    assert [len(part.target) // 8 for part in (train, select, score)] == [12, 4, 4]
    torch.testing.assert_close(train.features.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.features.square().mean(0), torch.ones(3))
    for part in (select, score):
        torch.testing.assert_close(part.features * train.known.std(0, correction=0) + train.known.mean(0), part.known)


def test_the_probe_is_ridge_regression_whose_intercept_is_free():
    x, y = torch.randn(400, 20, generator=generator(0)), torch.randint(C, (400,), generator=generator(1))
    x[:, 10:] = x[:, :10] + 0.3 * x[:, 10:]  # which takes some steps to tell apart
    sample = probe.Sample(torch.zeros(400, C), x, (y + (x[:, 2] > 0)) % C)
    W = torch.zeros(21, C, requires_grad=True)
    probe._fit(W, sample, 5.0)
    theirs = LogisticRegression(C=1 / 5.0, tol=1e-8, max_iter=5000).fit(x, sample.target)
    np.testing.assert_allclose(W[:-1].detach().T, theirs.coef_, atol=2e-3)
    np.testing.assert_allclose(
        W[-1].detach() - W[-1].detach().mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3
    )


def test_the_ridge_is_chosen_on_other_text_than_is_scored():
    """Where the two would choose differently, the choice is that of the text that isn't scored."""
    differed = 0
    for seed in range(12):
        dice = generator(seed)
        target = torch.randint(C, (10, 8), generator=dice)
        features = torch.randn(10, 8, 30, generator=dice)
        features[..., :C] += 4 * F.one_hot(target, C) * (seed > 9)  # which is best read with the weakest
        parts = probe._parts(uniform(target), features, target)
        W, tried = torch.zeros(31, C, requires_grad=True), []
        for ridge in (1000.0, 100.0, 10.0):
            probe._fit(W, parts[0], ridge)
            with torch.no_grad():
                tried.append((float(probe._loss(W, parts[1])), float(probe._loss(W, parts[2]))))
        stop = next(
            (i for i in range(1, len(tried)) if tried[i][0] >= tried[i - 1][0]), len(tried)
        )  # then it's no better
        chosen, best = tried[stop - 1][1], min(score for _, score in tried)
        assert probe._held_out(parts) == pytest.approx(chosen, rel=1e-5)
        differed += chosen > best + 1e-3
        assert (stop == 3) or seed <= 9
    assert differed > 2


def test_what_routing_tells_of_coins_is_known(monkeypatch):
    """Each token is a fair coin, the decisions as trained are the next coin and the causal ones the current one: 1 bit and none."""
    windows = 97 + torch.randint(2, (200, 18), generator=generator())
    counts = torch.zeros(256)
    counts[97], counts[98] = 6, 5  # two classes: 97, and all else

    class Coins:
        token_counts, train = counts.numpy(), [windows.numpy()]

    def of_coins(model, ids):
        causal = model.moe_layers[0].router.causal
        assert len(ids) == 4  # as in training
        mine = (windows[:, :-1] == ids[:1]).all(1).nonzero()[0, 0]  # batches are parts of the windows, in order
        coins = windows[mine : mine + len(ids), :-1] if causal else windows[mine : mine + len(ids), 1:]
        return model.hidden(ids), F.one_hot(coins - 97, 4).bool()[None]

    monkeypatch.setattr(causality, "held_out", lambda config, batches: (Coins, windows))
    monkeypatch.setattr(causality, "decisions", of_coins)
    features, factors = causality.routing_features, set()
    monkeypatch.setattr(causality, "routing_features", lambda taken, c: factors.add(c) or features(taken, c))
    model, config = model_of(layers=2), CONFIG.replace(layers=2, sequence_length=17, batch_size=4)
    found = causality.next_token_information(model, config, batches=1, classes=2)
    assert factors == {config.capacity_factor} and found["tokens"] == 200 * 16
    assert (found["classes"], found["covered"]) == (2, pytest.approx(6 / 11))
    bits = {(row["given"], row["routing"]): row["bits"] for row in found["rows"]}
    for given in causality.GIVEN[:2]:
        assert found["entropy"][given].item() == pytest.approx(1.0, abs=0.02)
        assert bits[given, "as trained"] == pytest.approx(1.0, abs=0.05) and abs(bits[given, "causally"]) < 0.02
    assert bits[causality.GIVEN[2], "as trained"] > 0.9 and abs(bits[causality.GIVEN[2], "causally"]) < 0.02


def test_the_entropies_are_losses_of_the_same_text(tiny_config):
    """With a class for each token: beyond the model itself it is its causal loss, beyond the current token the bigram's."""
    config = tiny_config(steps=4)
    model = run_or_load(config, progress=False).load_model()
    found = causality.next_token_information(model, config, batches=4, classes=300)
    assert found["classes"] == 256 and found["covered"] == pytest.approx(1, abs=0.01)
    data, windows = held_out(config.replace(eval_batches=4), 4)
    ids, following = windows[:, :-1], windows[:, 1:-1]
    with causal_routing(exact := causality._opened(model, config)[0]), torch.no_grad():
        losses = [
            F.cross_entropy(exact(part)[:, :-1].flatten(0, 1), target.flatten())
            for part, target in zip(ids.split(config.batch_size), following.split(config.batch_size), strict=True)
        ]
    entropy = {given: float(nats) * math.log(2) for given, nats in found["entropy"].items()}
    assert entropy["the model, causally"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    pairs = np.zeros((256, 256))
    np.add.at(pairs, (data.train[0][:, :-1].ravel(), data.train[0][:, 1:].ravel()), 1)
    unigram = (pairs.sum(0) + 0.5) / (pairs.sum() + 128)
    bigram = (pairs + 8 * unigram) / (pairs.sum(1, keepdims=True) + 8)  # smoothed as the results that are kept
    current, following = ids[:, :-1].numpy(), following.numpy()
    assert entropy["token frequencies"] == pytest.approx(-np.log(unigram[following]).mean(), rel=1e-4)
    assert entropy["the current token"] == pytest.approx(-np.log(bigram[current, following]).mean(), rel=1e-4)


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="3 sequences are too few"):
        information(torch.zeros(3, 2, C), {}, torch.zeros(3, 2, dtype=torch.long))
    assert information(torch.zeros(4, 2, C), {}, torch.zeros(4, 2, dtype=torch.long)) == {}


def test_classes_and_tables_count_the_training_text():
    counts = torch.tensor([3, 9, 1, 5]).numpy()
    class_of, covered = causality.frequent_classes(counts, 3)
    assert class_of.tolist() == [2, 0, 2, 1] and covered == pytest.approx(14 / 18)
    many, _ = causality.frequent_classes(np.ones(100), 100)
    assert many.tolist() == list(range(100))  # of equals, the first
    logits = 8 * torch.randn(5, 4, generator=generator())
    p = logits.softmax(1)
    expected = torch.stack([p[:, 1], p[:, 3], p[:, 0] + p[:, 2]], 1)
    torch.testing.assert_close(causality.by_class(logits, class_of).exp(), expected)

    windows = np.random.default_rng(0).integers(0, 100, (9000, 4)).astype(np.uint8)  # several parts
    class_of, counts = torch.arange(100) % 7, np.zeros((100, 7))

    class Data:
        train = [windows, np.zeros((9000, 4))]  # and their tasks

    for row in windows:
        for before, after in zip(row, row[1:], strict=False):
            counts[before, after % 7] += 1
    share = (counts.sum(0) + 0.5) / (counts.sum() + 7 / 2)
    unigram, bigram = causality.class_tables(Data, class_of)
    np.testing.assert_allclose(unigram.exp(), share, rtol=1e-5)
    np.testing.assert_allclose(bigram.exp(), (counts + 8 * share) / (counts.sum(1, keepdims=True) + 8), rtol=1e-5)


def test_features_are_each_tokens_own_and_the_places_left_by_loops():
    taken = torch.rand(2, 3, 6, 4, generator=generator(1)) < 0.4
    features = causality.routing_features(taken, 1.5)
    assert features.shape == (3, 5, 16)
    for b in range(3):
        for t in range(5):
            own = [float(taken[layer, b, t, i]) for layer in range(2) for i in range(4)]
            left = [6 * 1.5 / 4 - int(taken[layer, b, : t + 1, i].sum()) for layer in range(2) for i in range(4)]
            shares = [min(max(places / (5 - t), 0), 1) for places in left]
            assert features[b, t].tolist() == pytest.approx(own + shares)
    with torch.device("meta"):  # where what is made without `device=` has no numbers
        assert torch.equal(causality.routing_features(taken, 1.5), features)


def test_features_say_what_an_expert_has_left():
    taken = torch.tensor([1, 1, 0, 0], dtype=torch.bool).view(1, 1, 4, 1)  # one expert with c = 1/2: two places
    features = causality.routing_features(taken, 0.5)[0]
    assert features.tolist() == [[1, pytest.approx(1 / 3)], [1, 0], [0, 0]]
    late = causality.routing_features(taken.flip(2), 0.5)[0]
    assert late[:, 1].tolist() == [pytest.approx(2 / 3), 1, 1]
    none = causality.routing_features(torch.zeros_like(taken), 0.5)[0]
    assert none[:, 1].tolist() == [pytest.approx(2 / 3), 1, 1]  # two places for the last token: it is taken


# Through a model

CONFIG = RunConfig(layers=4, d_model=16, d_ff=32, heads=2, num_experts=4, sequence_length=16, batch_size=4)


def ids(seed):
    return torch.randint(256, (4, 16), generator=generator(seed))


def model_of(**keys):
    model = build_model(CONFIG.replace(**keys)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        model(ids(9))
    return model.eval()


@pytest.mark.parametrize(
    "keys, later, others",
    [
        ({"pool": "sequence"}, True, False),
        ({"pool": "position"}, False, True),
        ({"pool": "batch"}, True, True),
        ({"pool": 32, "gate": "renormalized"}, True, True),
        ({"router": "expert_threshold"}, False, False),
    ],
    ids=str,
)
def test_what_decisions_depend_on(keys, later, others):
    found = causality.changed_decisions(model_of(**keys), ids(0), ids(1), kept=4)
    share = {(row["change"], row["routing"]): (float(row["decisions"]), float(row["tokens"])) for row in found}
    assert share["later tokens replaced", "causally"] == share["other sequences replaced", "causally"] == (0, 0)
    for change, changes in (("later tokens replaced", later), ("other sequences replaced", others)):
        decisions, tokens = share[change, "as trained"]
        assert (0.01 < decisions <= tokens <= 1) if changes else decisions == tokens == 0


def test_decisions_say_who_took_whom():
    model = model_of(capacity_factor=1.0)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.weight *= 20  # some are taken with hardly a weight
    hidden, taken = causality.decisions(model, ids(0))
    assert hidden.shape == (4, 16, 16) and taken.shape == (2, 4, 16, 4)
    assert (taken.sum((1, 2)) == 16).all()  # n c / e tokens for each expert of each layer


def test_a_token_changed_if_any_of_its_layers_did(monkeypatch):
    def of_ends(
        model, ids
    ):  # (2 layers, 2 sequences, 4 positions, 2 experts), as the last tokens of both sequences say
        taken, ends = torch.zeros(2, 2, 4, 2, dtype=torch.bool), ids[:, -1].bool()
        taken[0, 0, :2, 0], taken[0, 1, 0, 0] = ends[0], ends[1]
        taken[1, :, 3, 1] = ends.flip(0)
        return None, taken

    monkeypatch.setattr(causality, "decisions", of_ends)
    zeros = torch.zeros(2, 4, dtype=torch.long)
    for row in causality.changed_decisions(model_of(), zeros, zeros + 1, kept=4):
        expected = {"later tokens replaced": (3 / 16, 3 / 4), "other sequences replaced": (2 / 32, 2 / 8)}
        assert (float(row["decisions"]), float(row["tokens"])) == expected[row["change"]]


@pytest.mark.parametrize(("asked", "expected"), [(3, [0, 2, 4]), (4, [0, 1, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_sequences_are_kept_from_first_to_last_each_alone(asked, expected, monkeypatch):
    here, other, kept, half = torch.zeros(5, 4), torch.ones(5, 4), [], []

    def of_kept(model, ids):
        if (mine := (ids == 0).all(1)).sum() == 1:
            kept.append(int(mine.nonzero()))
        half.append((ids == 0).float().mean().item())
        return None, torch.zeros(2, 5, 4, 2, dtype=torch.bool)

    monkeypatch.setattr(causality, "decisions", of_kept)
    causality.changed_decisions(model_of(), here, other, kept=asked)
    assert kept == expected * 2 and half.count(0.5) == 2  # as trained, and causally


def test_dependence_is_of_whole_sequences(monkeypatch):
    windows = ids(0).repeat(2, 1)[:, [*range(16), 0]]
    monkeypatch.setattr(causality, "_opened", lambda *given: (None, None, windows) if given[2] == 2 else None)
    monkeypatch.setattr(causality, "changed_decisions", lambda _, here, other, kept: [here, other, kept])
    here, other, kept = causality.dependence(None, CONFIG, kept=3)["rows"]
    assert torch.equal(torch.cat([here, other]), windows[:, :16]) and len(here) == len(other) and kept == 3
    assert causality.dependence(None, CONFIG)["rows"][2] == 4


def test_how_much_is_probed_where_nothing_is_asked_for(monkeypatch):
    asked, data = [], SimpleNamespace(token_counts="counts")
    opened = lambda model, config, batches: asked.append((config.eval_batches, batches)) or (model, data, ids(0))  # noqa: E731
    monkeypatch.setattr(causality, "_opened", opened)
    monkeypatch.setattr(causality, "frequent_classes", lambda *given: asked.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        causality.next_token_information(None, CONFIG)
    assert asked == [(16, 16), ("counts", 32)]


def test_one_sequence_on_its_own_is_a_loop_by_hand():
    model, windows = model_of(), torch.cat([ids(2), ids(3)[:, :1]], dim=1)
    alone = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None, :-1])[0]
            alone += [-float(logits[t].log_softmax(0)[window[t + 1]]) for t in range(16)]
    with altered(model, pool="sequence", rounding="exact"):
        for batch_size in (4, 1):
            assert causality.loss(model, windows, batch_size) == pytest.approx(sum(alone) / len(alone), rel=1e-12)
    assert model.moe_layers[0].router.pool == "batch"
    assert causality.loss(model, windows, 4) != pytest.approx(sum(alone) / len(alone), rel=1e-6)


def test_global_top_k_takes_the_best_pairs_of_each_sequence():
    model = model_of(capacity_factor=1.0, gate="renormalized")
    with altered(model, assign=causality.best_pairs), torch.no_grad():
        together, alone = model(ids(0)), torch.cat([model(row[None]) for row in ids(0)])
        logits = torch.randn(32, 4, generator=generator(5))
        chosen = model.moe_layers[0].router.assign(logits, batch_shape=(2, 16)).dense(32)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    assert not torch.allclose(together, model(ids(0)))
    for half, S in zip(chosen.split(16), logits.softmax(1).split(16), strict=True):
        best = torch.where(S.flatten().sort().values[-16] <= S, S, 0.0)  # 16 tokens x c
        torch.testing.assert_close(half, best / best.sum(1, keepdim=True).clamp_min(1e-30))


def test_of_100_tokens_29_are_a_share_of_0_29():
    """Although the product of both is a little less, in floats."""
    router = ExpertChoice(8, 4, 0.29, rounding="down")
    found = causality.best_pairs(router, torch.randn(200, 4, generator=generator()), batch_shape=(2, 100)).dense(200)
    assert [int((half > 0).sum()) for half in found.split(100)] == [29, 29]


def test_measurements_of_a_run(tiny_config, monkeypatch):
    config = tiny_config(steps=6, pool="sequence", layers=4)
    result = run_or_load(config, progress=False)
    model = result.load_model()

    told = pd.DataFrame(causality.next_token_information(model, config, batches=6, classes=8)["rows"])
    assert told.groupby("given")["routing"].apply(list).tolist() == [["as trained", "causally"]] * 3

    rows = causality.losses_by_routing(model, config, pools=[2, "sequence", "batch"])["rows"]
    losses = {row["way"]: row["loss"] for row in rows}
    assert [row["pool_tokens"] for row in rows] == [16, None, 2, 16, 128, 16]
    summary, (_, windows) = result.summary, held_out(config, 2)
    assert causality.loss(model, windows, 8) == pytest.approx(summary["val_loss"], rel=1e-5)
    with causal_routing(model):
        assert causality.loss(model, windows, 8) == pytest.approx(summary["val_loss_causal"], rel=1e-5)
    # In float64 a token may go to another expert than in training's float32.
    assert losses["as trained"] == losses["sequence"] == pytest.approx(summary["val_loss"], abs=3e-3)
    assert losses["causally"] == pytest.approx(summary["val_loss_causal"], abs=3e-3)
    assert len({round(loss, 9) for loss in losses.values()}) == 5

    told, generate = [], causality.generate
    monkeypatch.setattr(causality, "generate", lambda *a, **k: told.append((a[1:], k)) or generate(*a, **k))
    decoded = causality.decoding(model, config, tokens=5)
    (((prompt, count), sampling),) = told
    assert torch.equal(prompt, windows[:1, :8]) and count == 5 and sampling == {"temperature": 0.8, "top_k": 40}
    monkeypatch.setattr(causality, "generate", lambda *a, **k: told.append(a[2]) or windows[:1])
    assert len(causality.decoding(model, config)["prompt"]) == 8 and told[1:] == [64]  # where nothing is asked for
    assert decoded["prompt"] == "".join(map(chr, windows[0, :8])) and len(decoded["continuation"]) == 5  # half of 16
    opened = causality._opened(model.train(), config)[0]
    assert not opened.training and model.training  # which is left as it was
    kernels = [[layer.kernels for layer in one.moe_layers] for one in (opened, model)]
    assert kernels == [["plain", "plain"], ["auto", "auto"]]
    assert (next(opened.parameters()).dtype, next(model.parameters()).dtype) == (torch.float64, torch.float32)


def test_each_way_routes_as_its_row_says_on_all_held_out_text(monkeypatch):
    model, asked = model_of(), []
    for router in (layer.router for layer in model.moe_layers):
        router.rounding = "down"  # as a model is loaded

    def settings(model, windows, batch_size):
        router = model.moe_layers[0].router
        return router.pool, router.rounding, router.causal, "assign" in vars(router), batch_size

    monkeypatch.setattr(causality, "_opened", lambda *given: asked.append(given[2]) or (model, None, ids(0)))
    monkeypatch.setattr(causality, "loss", settings)
    rows = causality.losses_by_routing(model, CONFIG.replace(eval_batches=3), pools=[2, "position"])["rows"]
    assert asked == [3] and [tuple(row.values()) for row in rows] == [
        ("as trained", 64, ("batch", "down", False, False, 4)), ("causally", None, ("batch", "down", True, False, 4)),
        ("2", 2, (2, "exact", False, False, 4)), ("position", 4, ("position", "exact", False, False, 4)),
        ("global top-k", 16, ("batch", "down", False, True, 4)),
    ]  # fmt: skip
    usual = causality.losses_by_routing(model, CONFIG)["rows"]
    assert [row["way"] for row in usual] == ["as trained", "causally", "sequence", "batch", "global top-k"]


def test_a_threshold_has_no_pool(tiny_config):
    config = tiny_config(steps=2, eval_every=2, router="expert_threshold")
    rows = causality.losses_by_routing(run_or_load(config, progress=False).load_model(), config)["rows"]
    assert [(row["way"], row["pool_tokens"]) for row in rows] == [("as trained", None), ("causally", None)]


# The figures


def test_places_are_a_share_of_the_tokens_left():
    taken = torch.rand(2, 3, 8, 4, generator=generator(0)) < 0.7  # more than c of 4 experts
    shares = causality.routing_features(taken, 1.0)[..., 8:]
    assert shares.min() == 0 and shares.max() <= 1
