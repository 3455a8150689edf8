"""What routing does on held-out text, against plain loops over the model's own combine weights."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ecmoe.measures import inspection
from ecmoe.routing import watched
from ecmoe.training.run import run_or_load


@pytest.fixture(scope="module")
def trained(tiny_config):
    config = tiny_config(layers=4, seed=5, sequence_length=32)
    return run_or_load(config, progress=False).load_model(), config


def test_counts_are_those_of_the_combine_weights(trained):
    model, config = trained
    found = inspection.experts_by_token(model, config)
    assert json.loads(json.dumps(found)) == found  # it is kept as JSON
    data, batch = inspection.held_out(config)
    n, seen = config.batch_size * config.sequence_length, []
    with watched(model) as routed, torch.no_grad():
        model(batch[:, :-1])
    for logits, assignment in routed:
        assert logits.shape == (n, config.num_experts)
        seen.append([int((row > 0).sum()) for row in assignment.dense(n)])
    assert "".join(found["text"]) == data.tokenizer.decode(batch[0, : len(found["text"])].tolist())
    assert found["counts"] == [layer[: len(found["text"])] for layer in seen]
    by_hand = {}
    for i, token in enumerate(batch[:, :-1].flatten().tolist()):
        by_hand.setdefault(data.tokenizer.decode([token]), []).append((seen[0][i] + seen[1][i]) / 2)
    assert {row["token"] for row in found["words"]} == {token for token, of in by_hand.items() if len(of) >= 20}
    assert len(found["text"]) == config.sequence_length and len(found["words"]) < len(by_hand)
    for row in found["words"]:
        values = by_hand[row["token"]]
        assert row["times"] == len(values) >= 20
        assert row["experts"] == pytest.approx(sum(values) / len(values))
    assert [row["experts"] for row in found["words"]] == sorted((r["experts"] for r in found["words"]), reverse=True)


def test_held_out_text_is_the_first_batches_of_validation(trained):
    _, config = trained
    data, windows = inspection.held_out(config.replace(eval_batches=3), 2)
    whole = torch.cat(data.val_batches())
    assert len(whole) == 3 * config.batch_size and torch.equal(windows, whole[: 2 * config.batch_size])


def test_of_much_text_a_word_occurs_more_often(monkeypatch):
    """Stand-ins for a model, and 44,000 tokens of which a word is one in 2,000: 22."""
    ids = torch.full((1, 44_001), 2)
    ids[0, :22], ids[0, 22:43] = 0, 1
    chosen = SimpleNamespace(experts_per_token=lambda n: torch.arange(n) % 5)
    model = SimpleNamespace(hidden=lambda ids: None, parameters=lambda: iter([torch.zeros(1)]))
    data = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "abc"[ids[0]]))
    monkeypatch.setattr(inspection, "watched", lambda model: nullcontext([(None, chosen)]))
    monkeypatch.setattr(inspection, "held_out", lambda config: (data, ids))
    found = inspection.experts_by_token(model, None)
    assert {word["token"]: word["times"] for word in found["words"]} == {"a": 22, "c": 43_957}
    assert found["text"] == [*22 * "a", *21 * "b", *197 * "c"] and found["counts"] == [[i % 5 for i in range(240)]]


def test_bytes_that_are_no_text_alone_stand_each_for_itself(trained, monkeypatch):
    model, config = trained
    data, batch = inspection.held_out(config)
    words = torch.tensor(list("né a".encode())).repeat(batch.numel())[: batch.numel()].view_as(batch)
    monkeypatch.setattr(inspection, "held_out", lambda _: (data, words))
    found = inspection.experts_by_token(model, config)
    assert {row["token"] for row in found["words"]} == {"n", "<195>", "<169>", " ", "a"}
    assert found["text"][:6] == ["n", "<195>", "<169>", " ", "a", "n"]


def test_watching_ends(trained):
    model, config = trained
    with pytest.raises(RuntimeError), watched(model) as seen:
        raise RuntimeError
    model(torch.zeros(config.batch_size, 8, dtype=torch.long))
    assert not seen and "assign" not in vars(model.moe_layers[0].router)


def test_caps_on_trained_scores(trained):
    model, config = trained
    found = inspection.caps_on_trained_scores(model, config)
    assert len(found["rows"]) == 2 * 2 * 2  # layers, caps, solvers
    held = inspection.held_out(config)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):  # what is made without `device=` has no numbers
        patch.setattr(inspection, "held_out", lambda config: held)
        assert inspection.caps_on_trained_scores(model, config) == found
    for row in found["rows"]:
        assert 0.5 < row["score_kept"] <= 1.0001
        if row["solver"] == "feasible":
            assert row["over_cap"] == row["empty"] == row["row_error"] == row["column_error"] == 0


def test_what_a_choice_breaks_is_counted(trained, monkeypatch):
    model, config = trained

    def first_tokens(S, k, b, solver):
        """Every expert takes the first k tokens, but the first expert k times the first."""
        I = torch.arange(k).repeat(1, S.shape[1], 1)
        I[0, 0] = 0
        return S.gather(2, I), I

    def soft(S, left, b, every):
        """Rows of k + b, but the last of 2, each spread over tokens as they score."""
        assert left.tolist() == [k] and every.shape == S[:, 0].shape and every.all()
        rows = torch.full((S.shape[1], 1), float(k + b))
        rows[-1] = 2
        return (rows * S / S.sum(2, keepdim=True)).log()

    monkeypatch.setattr(inspection, "capped_top_k", first_tokens)
    monkeypatch.setattr(inspection, "dykstra", soft)
    k, e = (
        int(config.batch_size * config.sequence_length * config.capacity_factor / config.num_experts),
        config.num_experts,
    )
    data, batch = inspection.held_out(config)
    with watched(model) as routed, torch.no_grad():
        model(batch[:, :-1])
    found, kept, spread = inspection.caps_on_trained_scores(model, config), [], []
    for logits, _ in routed:  # the scores of those that were chosen, over those of each expert's best
        S = logits.softmax(1)
        chosen = k * S[0, 0] + S[:k, 1:].sum()
        spread.append((S / S.sum(0)).T)  # (e, n)
        kept.append(float(chosen / sum(S[:, i].sort().values[-k:].sum() for i in range(e))))
    assert found["tokens"] == config.batch_size * config.sequence_length
    where = [(layer, cap, solver) for layer in range(2) for cap in (2, 3) for solver in ("feasible", "dykstra")]
    assert [(row["layer"], row["cap"], row["solver"]) for row in found["rows"]] == where
    for row in found["rows"]:
        assert row["score_kept"] == pytest.approx(kept[row["layer"]], rel=1e-5)
        over = 1 + (k - 1) * (e - 1 > row["cap"])
        assert row["over_cap"] == over and row["empty"] == k - 1
        cap, errors = row["cap"], (row["row_error"], row["column_error"])
        if row["solver"] == "feasible":
            assert errors == (k - 1, e - cap)
        else:  # of what the choice is made from
            of_tokens = ((k + cap) * spread[row["layer"]][:-1].sum(0) + 2 * spread[row["layer"]][-1]).max()
            assert errors == pytest.approx((max(cap, k - 2), max(float(of_tokens) - cap, 0)), rel=1e-3)
