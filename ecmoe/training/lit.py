"""LitModel and LitClassifier: a run as a LightningModule, for this project's Trainer or your own.

    L.Trainer(max_steps=100, val_check_interval=20).fit(LitModel(config), datamodule=TextData(config))

They log train_loss and aux_loss at each step; val_loss, val_loss_causal (or accuracy) and routing statistics of the MoE
layers (`MoE.statistics`) at each validation, except one without a training step since the last."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.model import metrics
from ecmoe.model.build import build_model
from ecmoe.model.expert_parallel import share_experts
from ecmoe.model.tracking import track
from ecmoe.model.transformer import Block
from ecmoe.routing import causal_routing, routers
from ecmoe.training import cuda_graph as graph
from ecmoe.training.optimizer import build_optimizer, clip, learning_rate_factor
from ecmoe.training.trainer import reduced_dtype


class LitModel(L.LightningModule):
    """A language model, trained to predict the next token. config: the run's config, or its keys and values.
    token_counts: (V,) corpus frequencies, for hash_table=balanced; not needed to load a checkpoint.

    A batch is (B, T + 1) int64: T inputs, each with the next token as target. For task-level routing it is a pair with
    the (B,) tasks of its sequences. Losses are in nats per token."""

    def __init__(self, config: RunConfig | Mapping[str, Any], token_counts: Tensor | None = None) -> None:
        super().__init__()
        self.config = RunConfig.of(config)
        self.save_hyperparameters({"config": self.config.to_dict()})
        self.counts_lack = token_counts is None and "token counts" in self.config.needs
        counts = torch.ones(self.config.vocab_size) if self.counts_lack else token_counts
        with ThreadPoolExecutor(1) as aside:  # both take seconds, and drawing weights doesn't hold Python's lock
            if self.config.compile:
                aside.submit(import_module, "torch._inductor.compile_fx")
            self.model = build_model(self.config, counts)
        self.routers = routers(self.model)
        # Sums since the last call of `means`, kept on the device: reading them in each step would stall the GPU.
        self.sums = {"loss": torch.zeros(()), "aux_loss": torch.zeros(()), "count": torch.zeros(())}
        self.statistics: dict[str, Tensor] = {}  # of the MoE layers, set at each validation
        self.stepped = False  # whether the layers' last forward was a training step's
        self.captured: graph.Losses | None = None  # `losses` as a CUDA graph, captured at the first step
        self.configured = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the model: (B, T) token ids -> (B, T, V) logits."""
        return self.model(*args, **kwargs)

    def configure_model(self) -> None:
        """Shard and compile the model, once. Lightning calls this in each process, whenever it fits or validates."""
        if self.configured:
            return
        self.configured = True
        if self.config.sharded:
            self._shard(self.device_mesh["data_parallel"])
        if self.config.compile:
            torch.compiler.reset()  # else numbers of an earlier run, such as its capacity factor, become dynamic
            self.model.compile_blocks()

    def _shard(self, mesh: Any) -> None:
        """Shard block by block with FSDP2; with strategy ep, spread the experts over ranks instead of sharding them."""
        layers, narrow = self.model.moe_layers, reduced_dtype(self.config)
        if by_expert := self.config.strategy == "ep":
            experts = share_experts(self.model, mesh, self.trainer.strategy.root_device)
        else:
            experts = {w for layer in layers for w in (layer.w1, layer.w2)}
        how = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=narrow), "ignored_params": experts}
        if by_expert:  # the other weights are small: keep them whole until the backward pass, which saves a gather
            how["reshard_after_forward"] = False
        for module in (*(m for m in self.model.modules() if isinstance(m, Block)), self.model):
            fully_shard(module, mesh=mesh, **how)
        # Experts compute in 16 bits, so send them in 16 bits. Norms and routers don't: they were sharded above.
        how = {"mp_policy": MixedPrecisionPolicy(narrow, narrow, cast_forward_inputs=False)}
        for layer in layers if not by_expert else ():
            fully_shard(layer, mesh=mesh, ignored_params=set(layer.parameters()) - experts, **how)

    def on_fit_start(self) -> None:
        if self.counts_lack:
            raise ValueError("hash_table=balanced: pass token_counts to LitModel; TextData has them after setup()")
        self.sums = {name: value.to(self.device) for name, value in self.sums.items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.config.cuda_graph and self.captured is None and graph.capturable(self):
            self.captured = graph.captured(self, batch)
        # Random numbers of a step (V-MoE's noise) depend only on seed, batch and rank, so a resumed run draws the same.
        torch.manual_seed(hash((self.config.seed, batch_idx, self.global_rank)))
        loss, aux_loss = (self.captured or self.losses)(batch)
        self.sums["loss"] += loss.detach()
        self.sums["aux_loss"] += aux_loss.detach()
        self.sums["count"] += 1
        self.stepped = True
        if self._trainer:
            self.log_dict({"train_loss": loss.detach(), "aux_loss": aux_loss.detach()})
        return loss + aux_loss

    def means(self) -> dict[str, Tensor]:
        """Return means of train_loss and aux_loss over ranks and over steps since the last call; NaN without steps."""
        every = self.trainer.strategy.all_gather
        sums = {name: every(value).double().sum() for name, value in self.sums.items()}
        for value in self.sums.values():
            value.zero_()
        return {"train_loss": sums["loss"] / sums["count"], "aux_loss": sums["aux_loss"] / sums["count"]}

    def on_validation_epoch_start(self) -> None:
        """Store the routing statistics of the last training step, over all ranks, before validation overwrites them."""
        layers = [layer.statistics() for layer in self.model.moe_layers] if self.stepped else []
        self.statistics, self.stepped = {}, False
        for metric in metrics.of_layers() if layers else ():
            values = self.trainer.strategy.all_gather(torch.stack([layer[metric.name] for layer in layers]).float())
            self.statistics[metric.name] = values.max() if metric.worst else values.mean()

    def validation_step(self, batch: Tensor, batch_idx: int, kind: str = "val_") -> dict[str, Tensor]:
        """Compute and log the values of `evaluate`, under names that begin with `kind`."""
        # Sizes in causal routing depend on the data, and each size would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            found = {name.replace("val_", kind): value for name, value in self.evaluate(batch).items()}
        if self._trainer:
            self.log_dict(found, batch_size=len(batch if isinstance(batch, Tensor) else batch[0]), sync_dist=True)
        return found

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.statistics)

    def test_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Like `validation_step`, but with names such as test_loss."""
        return self.validation_step(batch, batch_idx, "test_")

    def evaluate(self, batch: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Return val_loss, routed as trained, and val_loss_causal, routed causally (NaN before there are cut-offs)."""
        loss = self.loss(batch)
        try:
            for router in self.routers:
                router.check_causal()
        except ValueError:  # no cut-offs yet, as in Lightning's check before the first step
            return {"val_loss": loss, "val_loss_causal": torch.full_like(loss, torch.nan)}
        with causal_routing(self.model):
            return {"val_loss": loss, "val_loss_causal": self.loss(batch) if self.routers else loss}

    def losses(self, batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the sum of auxiliary losses. Clear these in the layers: they keep the graph in memory."""
        loss = self.loss(batch)
        aux = [layer.aux_loss for layer in self.model.moe_layers if layer.aux_loss is not None]
        for layer in self.model.moe_layers:
            layer.aux_loss = None
        return loss, torch.stack(aux).sum() if aux else torch.zeros_like(loss)

    def loss(self, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the mean cross-entropy of (B, T + 1) token ids, in nats per token."""
        tokens, tasks = (batch, None) if isinstance(batch, Tensor) else batch
        return self.model(tokens[:, :-1], tasks, targets=tokens[:, 1:])

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **how: Any) -> None:
        """Clip by the Trainer's value if set, else by the config's gradient_clip, which also clips sharded models."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, **how)
        elif self.config.gradient_clip:
            clip(self.parameters(), optimizer, self.config.gradient_clip)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.config, self.parameters(), self.device)
        track(self.model, optimizer)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(self.config, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the running sums, which an exact resume needs; on resume, each rank starts from their mean over ranks."""
        every = self.trainer.strategy.all_gather
        checkpoint["sums"] = {name: every(value).mean().cpu() for name, value in self.sums.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # With sharded weights Lightning loads after `on_fit_start`.
        self.sums, self.counts_lack = {name: value.to(self.device) for name, value in checkpoint["sums"].items()}, False


class LitClassifier(LitModel):
    """An image classifier. A batch is (B, C, H, W) images in [0, 1], (B,) int64 classes; losses in nats per image."""

    def evaluate(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the loss, and the accuracy: the share of images whose class has the largest logit."""
        images, labels = batch
        logits = self.model(images).float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"val_loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of images and their classes, in nats per image."""
        images, labels = batch
        return F.cross_entropy(self.model(images).float(), labels)
