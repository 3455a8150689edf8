"""The one list of metrics: what is added there arrives everywhere, and what a layer tells is what it did."""

import dataclasses

import pytest
import torch

from ecmoe import MoE, run_or_load
from ecmoe.model import metrics
from ecmoe.model.metrics import Metric
from ecmoe.report import plots
from ecmoe.routing import ExpertChoice, TokenChoice
from ecmoe.study.table import curves, table


def test_a_new_metric_arrives_in_curve_summary_and_table(monkeypatch, tiny_config):
    idle = Metric("idle", "experts without a token (%)", "share", of=lambda layer: (layer.load == 0).float().mean())
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, idle])
    result = run_or_load(tiny_config(seed=71, steps=4, num_experts=4), progress=False)  # each expert takes half
    assert result.curve["idle"].tolist() == [0.0] and result.summary["routing"]["idle"] == 0.0
    assert table({"EC": [result]})["idle"].tolist() == curves({"EC": [result]})["idle"].tolist() == [0.0]


def test_no_curve_and_no_table_has_a_column_that_no_run_fills(tiny_config):
    result = run_or_load(tiny_config(seed=71, steps=4, num_experts=4), progress=False)
    rows, curve = table({"EC": [result]}), result.curve
    assert set(curve.columns[curve.isna().all()]) == {"accuracy"}  # that of images
    assert {name for name in metrics.table() if rows[name].isna().all()} == {"accuracy", "mfu"}  # a GPU's rate
    assert set(metrics.curve()) - set(metrics.table()) == {"step", "learning_rate", "aux_loss"}
    assert set(metrics.table()) - set(metrics.curve()) == {"perplexity", "bits_per_byte", "mfu", "step_ms"}
    broken = table({"EC": [dataclasses.replace(result, summary={**result.summary, "status": "diverged"})]})
    lost = {name for name in metrics.table() if broken[name].isna().all()} - {"accuracy", "mfu"}
    assert lost == {"val_loss", "val_loss_causal", "perplexity", "bits_per_byte"}


def test_a_layers_metrics_are_in_float32_whatever_the_default():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer = MoE(TokenChoice(8, 4, top_k=1, capacity_factor=0.5), 8, 16)
        layer(torch.randn(1000, 8))
        assert {value.dtype for value in layer.statistics().values()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


def test_every_metric_has_words_for_its_axis():
    assert {metric.name for metric in metrics.METRICS} <= set(plots.LABELS)
    assert len({metric.name for metric in metrics.METRICS}) == len(metrics.METRICS)


def test_metrics_are_listed_as_a_reader_looks_for_them():
    """The order is that of a curve's columns; a label says what the name means."""
    layers = {
        "dropped": "requests dropped",
        "over_capacity": "demand above an equal share",
        "max_load": "demand over the mean demand",
    }
    layers |= {f"share_{j}": f"tokens that {j} experts took (%)" for j in range(8)}
    layers["share_8"] = "tokens that 8 experts took or more (%)"
    curve = {
        "step": "training step", "tokens": "training tokens", "seconds": "training time", "train_loss": "training loss",
        "learning_rate": "learning rate", "aux_loss": "auxiliary loss", "tokens_per_second": "training speed",
        "val_loss": "validation loss (", "val_loss_causal": "validation loss, routed causally", "accuracy": "validation accuracy",
    }  # fmt: skip
    once = {
        "perplexity": "validation perplexity", "bits_per_byte": "bits per byte", "mfu": "share of the device's",
        "step_ms": "time of a training step",
    }  # fmt: skip
    said = {metric.name: metric.label for metric in metrics.METRICS}
    assert list(said) == list(curve | once | layers) and metrics.curve() == list(curve | layers)
    assert metrics.table() == [name for name in said if name not in ("step", "learning_rate", "aux_loss")]
    assert all(words in said[name] for name, words in (curve | once | layers).items())


def test_validation_alone_needs_a_run_that_finished():
    assert metrics.results() == ["val_loss", "val_loss_causal", "accuracy", "perplexity", "bits_per_byte"]


def test_over_layers_a_load_is_the_worst_and_a_share_the_mean():
    assert [m.name for m in metrics.of_layers() if m.worst] == ["over_capacity", "max_load"]


def test_units_are_those_that_the_words_say():
    own = {"seconds": "(s)", "tokens_per_second": "(tokens per second)", "bits_per_byte": "(bits per byte)", "mfu": "(MFU)",
           "step_ms": "(ms)"}  # fmt: skip
    for metric in metrics.METRICS:
        said = "nats" if "nats per token" in metric.label else "share" if "(%)" in metric.label else ""
        assert metric.unit == said, metric.name
        words = {"nats": "(nats per token)", "share": "(%)"}.get(said, own.get(metric.name, ""))
        assert metric.label.endswith(words) and bool(words) == ("(" in metric.label), metric.name
        of_validation = metric.name.startswith("val_") or metric.name in ("accuracy", "perplexity", "bits_per_byte")
        assert metric.label.startswith("validation") == of_validation, metric.name


def test_a_layer_tells_what_it_did():
    moe = MoE(TokenChoice(3, 3, 1, 1.0), 3, 4)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(3))
    moe(torch.eye(3)[[0, 0, 0, 0, 1, 2]] * 5)  # expert 0 has two places for four tokens
    told = {name: float(value) for name, value in moe.statistics().items()}
    assert told["dropped"] == pytest.approx(2 / 6) and told["share_0"] == pytest.approx(2 / 6)
    moe(torch.eye(3)[:1])
    assert float(moe.statistics()["share_1"]) == 1 and float(moe.statistics()["dropped"]) == 0
    assert told["max_load"] == 2 and told["over_capacity"] == 1 and told["share_1"] == pytest.approx(4 / 6)


def test_the_last_share_is_of_eight_experts_or_more():
    for experts in (7, 8, 10):
        moe = MoE(ExpertChoice(3, experts, float(experts)), 3, 4)  # each takes all
        moe(torch.randn(6, 3))
        assert float(moe.statistics()[f"share_{min(experts, 8)}"]) == 1


def test_a_layer_that_routed_nothing_has_no_shares():
    moe = MoE(ExpertChoice(3, 3), 3, 4)
    assert all(value.isnan() for value in moe.statistics().values())
