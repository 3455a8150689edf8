"""LitModel: its loss, its wiring, and that it lives in anyone's Trainer."""

import functools
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ecmoe import routing
from ecmoe.config import RunConfig
from ecmoe.data.batches import TextData
from ecmoe.model.transformer import Block
from ecmoe.training import cuda_graph as graph
from ecmoe.training import lit as lit_module
from ecmoe.training.lit import LitClassifier, LitModel


def test_loss_is_the_cross_entropy_of_the_next_tokens(tiny_config):
    lit = LitModel(tiny_config())
    batch = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(0))
    logits = lit.model(batch[:, :-1])
    torch.testing.assert_close(lit.loss(batch), F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    torch.testing.assert_close(lit(batch[:, :-1], targets=batch[:, 1:]), lit.loss(batch))


def test_sums_of_a_checkpoint_come_to_the_device_whenever_they_are_loaded(tiny_config, monkeypatch):
    lit = LitModel(tiny_config())
    saved = {"sums": dict(lit.sums)}
    monkeypatch.setattr(LitModel, "device", torch.device("meta"))
    for hook in (lit.on_fit_start, lambda: lit.on_load_checkpoint(saved)):  # as with sharded weights
        hook()
        assert all(value.is_meta for value in lit.sums.values())


def test_blocks_are_compiled_and_validation_is_not(tiny_config):
    lit = LitModel(tiny_config(router="dense", compile=True)).eval()
    lit.configure_model()
    compiled = [block._compiled_call_impl for block in lit.model.blocks]
    lit.configure_model()  # as every fit and every validation calls it
    assert all(
        block._compiled_call_impl is made is not None for block, made in zip(lit.model.blocks, compiled, strict=True)
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batch = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(0))
    assert lit.validation_step(batch, 0)["val_loss"].isfinite()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("compiles", [True, False])
def test_the_compiler_is_imported_beside_the_drawing_of_weights_where_it_is_needed(tiny_config, monkeypatch, compiles):
    order, build = [], lit_module.build_model
    monkeypatch.setattr(lit_module, "import_module", order.append)
    monkeypatch.setattr(lit_module, "build_model", lambda *given: order.append("model") or build(*given))
    LitModel(tiny_config(compile=compiles))
    assert sorted(order) == ["model", *["torch._inductor.compile_fx"] * compiles]


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
WINDOWS = list(torch.randint(256, (12, 8, 17), generator=torch.Generator().manual_seed(1)))


def batches(some) -> DataLoader:
    """As anyone has them."""
    return DataLoader(some, batch_size=None)


def test_a_default_trainer_checks_trains_stops_and_keeps_the_best(tiny_config, tmp_path):
    """Nothing of ours around it: the check before the first step, loggers, ModelCheckpoint and EarlyStopping on val_loss."""
    lit = LitModel(tiny_config(learning_rate=3e-3))
    stop = EarlyStopping("val_loss", patience=1)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True)
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="csv", version="")
    keys = QUIET | {"logger": logger, "default_root_dir": tmp_path, "log_every_n_steps": 1}
    trainer = L.Trainer(max_epochs=3, callbacks=[stop, best], **keys)
    trainer.fit(lit, batches(WINDOWS[:10]), batches(WINDOWS[10:]))
    assert trainer.global_step >= 10 and best.best_model_score == stop.best_score < 6
    logged = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "aux_loss", "val_loss", "val_loss_causal", "dropped", "max_load", "share_0"} <= set(logged)

    again = LitModel.load_from_checkpoint(best.best_model_path)
    assert again.config == lit.config
    (found,) = L.Trainer(**QUIET).validate(again, batches(WINDOWS[10:]), verbose=False)
    assert found["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert found["val_loss_causal"] != found["val_loss"] and "dropped" not in found
    (tested,) = L.Trainer(**QUIET).test(again, batches(WINDOWS[10:]), verbose=False)
    assert tested["test_loss"] == found["val_loss"] and tested["test_loss_causal"] == found["val_loss_causal"]
    torch.testing.assert_close(again(WINDOWS[0]), again.model(WINDOWS[0]))


def test_a_validation_before_any_step_has_no_causal_loss_yet(tiny_config):
    (found,) = L.Trainer(**QUIET).validate(LitModel(tiny_config()), batches(WINDOWS[:2]), verbose=False)
    assert found["val_loss"] > 0 and found["val_loss_causal"] != found["val_loss_causal"]


def test_our_data_feed_anyones_trainer(tiny_config):
    config = tiny_config(router="task_level")
    trainer = L.Trainer(max_steps=4, val_check_interval=2, enable_checkpointing=False, **QUIET)
    trainer.fit(LitModel(config), datamodule=TextData(config))
    assert trainer.global_step == 4 and trainer.callback_metrics["val_loss"] > 0


def test_a_validation_tells_how_the_step_before_it_routed_and_one_without_a_step_nothing(tiny_config):
    lit = LitModel(tiny_config(router="token_choice", capacity_factor=0.5))

    def statistic() -> float:
        return float(torch.stack([layer.statistics()["dropped"] for layer in lit.model.moe_layers]).mean())

    dropped = []
    keep = LambdaCallback(on_train_batch_end=lambda *_: dropped.append(statistic()))
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, callbacks=[keep], enable_checkpointing=False, **QUIET)
    trainer.fit(lit, batches(WINDOWS[:2]))
    told = [L.Trainer(**QUIET).validate(lit, batches(WINDOWS[10:]), verbose=False)[0] for _ in range(2)]
    assert told[0]["dropped"] == pytest.approx(dropped[-1]) and "dropped" not in told[1]
    assert statistic() != dropped[-1]  # of the validation, routed causally


def test_images_log_their_accuracy():
    config = RunConfig(data="digits", patch_size=2, sequence_length=16, layers=2, d_model=16, d_ff=16, heads=2, steps=2)
    lit, images = LitClassifier(config), torch.rand(16, 1, 8, 8)
    labels = (lit.model(images).argmax(1) + (torch.arange(16) > 4)) % 10  # five are right
    batch = (images, labels)
    (found,) = L.Trainer(**QUIET).validate(lit, batches([batch]), verbose=False)
    p = lit.model(images).detach().softmax(1)
    loss, right = -p[range(16), labels].log().mean().item(), (p.max(1).values == p[range(16), labels]).sum().item()
    assert found == pytest.approx(found | {"val_loss": loss, "accuracy": right / 16}) and "val_loss_causal" not in found
    assert right == 5
    assert lit.loss(batch).item() == pytest.approx(loss)


def test_a_balanced_table_comes_from_the_corpus_or_a_checkpoint_never_from_nothing(tiny_config, tmp_path):
    config = tiny_config(router="hash", hash_table="balanced")
    with pytest.raises(ValueError, match="pass token_counts to LitModel"):
        L.Trainer(max_steps=1, **QUIET).fit(LitModel(config), batches(WINDOWS[:1]))
    lit = LitModel(config, torch.arange(256))
    assert torch.equal(lit.routers[0].table, routing.build_router(config, torch.arange(256)).table)
    trainer = L.Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(lit, batches(WINDOWS[:1]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = LitModel.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.routers[0].table, lit.routers[0].table) and not again.counts_lack


def step(lit: LitModel, **keys) -> LitModel:
    L.Trainer(max_steps=1, barebones=True, accelerator="cpu", **keys).fit(lit, batches(WINDOWS[:1]))
    return lit


def test_the_auxiliary_loss_is_trained_and_the_layers_forget_it(tiny_config):
    keys = {"router": "token_choice", "capacity_factor": 1.0}
    lit = LitModel(tiny_config(**keys, aux_loss_weight=0.5))
    plain = LitModel(tiny_config(**keys, aux_loss_weight=0.0))
    total, loss = lit.training_step(WINDOWS[0], 0), plain.training_step(WINDOWS[0], 0)
    assert lit.sums["loss"] == plain.sums["loss"] == loss
    assert float(lit.sums["aux_loss"]) > 0.4  # two experts of four at least, so 0.5 x 1 at an even load
    assert float(total) == pytest.approx(float(loss + lit.sums["aux_loss"]), rel=1e-6)
    assert all(layer.aux_loss is None for layer in lit.model.moe_layers)
    total.backward(), loss.backward()
    weight = "blocks.1.moe.router.weight"
    assert not torch.allclose(lit.model.get_parameter(weight).grad, plain.model.get_parameter(weight).grad)


def test_the_auxiliary_losses_of_all_layers_are_added(tiny_config):
    lit, seen = LitModel(tiny_config(router="token_choice", capacity_factor=1.0, layers=4)), []
    for layer in lit.model.moe_layers:
        layer.register_forward_hook(lambda layer, inputs, out: seen.append(float(layer.aux_loss)))
    _, aux_loss = lit.losses(WINDOWS[0])
    assert len(seen) == 2 and float(aux_loss) == pytest.approx(sum(seen), rel=1e-6)


def test_noise_is_another_in_each_step_and_rank_and_the_same_in_a_step_that_is_repeated(tiny_config, monkeypatch):
    lit = LitModel(tiny_config(router="token_choice", capacity_factor=1.0, balance="importance_load"))
    first, again, other = (float(lit.training_step(WINDOWS[0], step)) for step in (0, 0, 1))
    assert first == again != other
    monkeypatch.setattr(LitModel, "global_rank", 1)
    assert float(lit.training_step(WINDOWS[0], 0)) not in (first, other)
    drawn = torch.initial_seed()
    lit.config = lit.config.replace(seed=1)
    lit.training_step(WINDOWS[0], 0)
    assert torch.initial_seed() != drawn  # another run's noise is another
    lit.training_step(WINDOWS[0], 5)
    drawn = torch.initial_seed()
    torch.manual_seed(hash((1, 5, 1)))  # of seed, step and rank, for ever
    assert torch.initial_seed() == drawn


def test_the_first_step_has_the_first_rate(tiny_config):
    made = LitModel(tiny_config(learning_rate=0.5, warmup_steps=4)).configure_optimizers()
    (group,) = made["optimizer"].param_groups
    assert group["lr"] == pytest.approx(0.125) and made["lr_scheduler"]["interval"] == "step"


def test_running_statistics_move_with_the_optimisers_step(tiny_config):
    cutoff = step(LitModel(tiny_config())).routers[0].cutoff
    assert float(cutoff.weight) == pytest.approx(1 - cutoff.beta) and float(cutoff.count) == 0


@pytest.mark.parametrize(
    ("of_config", "of_trainer", "expected"), [(0.125, None, 0.125), (1e3, 0.125, 0.125), (0.0, None, None)]
)
def test_gradients_are_clipped_by_the_config_or_by_the_trainer(tiny_config, of_config, of_trainer, expected):
    lit = LitModel(tiny_config(gradient_clip=of_config))
    if expected is None:  # not at all
        (alone := LitModel(lit.config)).training_step(WINDOWS[0], 0).backward()
        expected = float(torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()]))
    before = [p.detach().clone() for p in lit.parameters()]
    lit.configure_optimizers = lambda: torch.optim.SGD(lit.parameters(), lr=1.0)  # moves by the gradient itself
    keys = QUIET | ({} if of_trainer is None else {"gradient_clip_val": of_trainer})
    L.Trainer(max_steps=1, enable_checkpointing=False, **keys).fit(lit, batches(WINDOWS[:1]))
    moved = [p.detach() - start for p, start in zip(lit.parameters(), before, strict=True)]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(expected, rel=1e-3)


def test_sums_are_of_all_steps_since_they_were_read(tiny_config):
    lit = LitModel(tiny_config(router="token_choice", capacity_factor=1.0))
    losses = [float(lit.training_step(batch, i).detach()) for i, batch in enumerate(WINDOWS[:3])]
    total = sum(float(value) for name, value in lit.sums.items() if name != "count")
    assert total == pytest.approx(sum(losses)) and lit.sums["count"] == 3
    assert not any(value.requires_grad for value in lit.sums.values())  # they would hold on to every pass
    before = dict(lit.sums)
    lit.on_fit_start()  # of a run that goes on
    assert lit.sums == before


def test_a_table_that_waits_for_its_counts_is_as_large_as_the_vocabulary(tiny_config):
    lit = LitModel(tiny_config(router="hash", hash_table="balanced", tokenizer="bpe", vocab_size=300))
    assert lit.counts_lack and lit.routers[0].table.shape == (300,)


def test_what_was_captured_is_what_trains_and_losses_add_up(tiny_config):
    lit = LitModel(tiny_config())
    lit.captured = lambda batch: (torch.tensor(2.0), torch.tensor(0.5))
    assert [float(lit.training_step(WINDOWS[0], step)) for step in (0, 1)] == [2.5, 2.5]
    assert {name: float(value) for name, value in lit.sums.items()} == {"loss": 4.0, "aux_loss": 1.0, "count": 2.0}


@pytest.mark.parametrize("asked", [True, False])
def test_a_step_is_captured_once_where_the_config_asks_and_it_can_be(asked, tiny_config, monkeypatch):
    seen = []

    def captured(lit, batch):
        seen.append(batch)
        return lambda batch: (torch.tensor(2.0), torch.tensor(0.5))

    monkeypatch.setattr(graph, "captured", captured)
    for can in (False, True):
        monkeypatch.setattr(graph, "capturable", lambda lit, can=can: can)
        lit = LitModel(tiny_config(cuda_graph=asked))
        losses = [float(lit.training_step(WINDOWS[0], step)) for step in (0, 1)]
        assert (losses == [2.5, 2.5]) == (asked and can)
    assert len(seen) == asked and all(batch is WINDOWS[0] for batch in seen)


@pytest.mark.parametrize(("strategy", "precision"), [("fsdp2", "bf16-mixed"), ("ep", "32-true")])
def test_a_sharded_model_reduces_what_it_computes_in(tiny_config, two_ranks, strategy, precision):
    def work(rank: int) -> list:
        lit = LitModel(tiny_config(strategy=strategy, devices=2, precision=precision, layers=4))
        lit._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
        lit._device_mesh = {"data_parallel": dist.device_mesh.init_device_mesh("cpu", (2,))}
        lit.configure_model()
        lit.configure_model()  # as every fit and every validation calls it
        sharded = [module for module in lit.modules() if isinstance(module, FSDPModule)]
        groups = [module._get_fsdp_state()._fsdp_param_group for module in sharded]
        weights = lit.model.moe_layers[0].w1.to_local()
        how = {
            type(module).__name__: [str(t) for t in (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype)]
            for module, group in zip(sharded, groups, strict=True)
        }
        return [how, sum(len(group.fsdp_params) for group in groups), groups[1].post_forward_mesh_info is None,
                list(weights.shape), lit.model.moe_layers[0].router.weight.dtype == torch.float32, len(list(lit.parameters()))]  # fmt: skip

    (how, params, kept, shape, wide, count), other = two_ranks(work)
    assert other == [how, params, kept, shape, wide, count] and shape == [2, 16, 32] and wide
    if strategy == "ep":  # its blocks stay whole until the backward pass; experts are no business of FSDP2
        assert how == {name: ["None", "None"] for name in ("FSDPTransformer", "FSDPBlock")}
        assert kept and params == count - 4
    else:  # experts alone travel in 16 bits
        narrow = "torch.bfloat16"
        assert how == {"FSDPTransformer": ["None", narrow], "FSDPBlock": ["None", narrow], "FSDPMoE": [narrow, narrow]}
        assert not kept and params == count


def test_sizes_that_depend_on_other_ranks_are_not_compiled(tiny_config, two_ranks, monkeypatch):
    """A graph for each size would cost seconds in the middle of training."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(routing.ranks, "ROWS", 1)
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counted))

    def work(rank: int) -> list[int]:
        lit = LitModel(tiny_config(strategy="ddp", devices=2, compile=True))
        lit.configure_model()
        made, sizes = [], set()
        for batch in WINDOWS[rank::2][:4]:
            lit.losses(batch)
            sizes.add(int(lit.model.moe_layers[0].load.max()))
            made.append(len(graphs))
        return [len(sizes) > 1, made[0] > 0, made[-1] - made[0]]

    assert two_ranks(work) == [[True, True, 0]] * 2


def test_a_callback_is_told_what_each_step_lost(tiny_config):
    told, lit, losses = [], LitModel(tiny_config(router="token_choice", aux_loss_weight=0.5, capacity_factor=1.0)), []
    loss = lit.loss
    lit.loss = lambda batch: losses.append(loss(batch)) or losses[-1]
    tell = LambdaCallback(on_train_batch_end=lambda trainer, *_: told.append(dict(trainer.callback_metrics)))
    L.Trainer(max_steps=2, enable_checkpointing=False, callbacks=[tell], **QUIET).fit(lit, batches(WINDOWS[:2]))
    assert [one["train_loss"] for one in told] == losses and losses[0] != losses[1] and told[0]["aux_loss"] > 0.4


def test_what_validation_logs_is_of_all_ranks_and_weighs_by_sequences(tiny_config, monkeypatch):
    lit, told = LitModel(tiny_config()), []
    lit._trainer = object()
    monkeypatch.setattr(lit, "log_dict", lambda values, **how: told.append(how))
    lit.validation_step(WINDOWS[0][:3], 0)
    by_task = LitModel(tiny_config(router="task_level"))
    by_task._trainer, by_task.log_dict = object(), lit.log_dict
    by_task.validation_step((WINDOWS[0][:5], torch.arange(5) % 4), 0)
    assert told == [{"batch_size": 3, "sync_dist": True}, {"batch_size": 5, "sync_dist": True}]


def test_without_experts_a_causal_loss_is_the_loss(tiny_config):
    found = LitModel(tiny_config(router="dense")).evaluate(WINDOWS[0])
    assert found["val_loss_causal"] == found["val_loss"] > 0
