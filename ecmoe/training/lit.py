"""LitModel and LitClassifier: a run as a LightningModule. Loss, optimiser, schedule; what Lightning doesn't know."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.model.transformer import Block, build_model
from ecmoe.routing import Router, causal_routing
from ecmoe.training import cuda_graph as graph


class LitModel(L.LightningModule):
    """Next-token prediction.

    Args:
        config: the run.
        token_counts: (V,) corpus frequencies, for hash_table=balanced.

    A batch is (B, T + 1) int64: T inputs, each with the next token as target; for task-level routing with the (B,)
    tasks of its sequences. Losses are nats per token.
    """

    def __init__(self, config: RunConfig, token_counts: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = build_model(config, token_counts)
        self.routers = [module for module in self.model.modules() if isinstance(module, Router)]
        # Sums since the last validation, on the device: reading them each step would stall the GPU.
        self.sums = {"loss": torch.zeros(()), "aux_loss": torch.zeros(()), "count": torch.zeros(())}
        self.captured: graph.Losses | None = None  # `losses` as a CUDA graph, from the first step on

    def configure_model(self) -> None:
        """Shard the blocks, then the rest (FSDP2); called by Lightning once the processes are up."""
        if self.config.strategy == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for module in self.model.modules():
                if isinstance(module, Block):
                    fully_shard(module, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        if self.config.compile:  # two kinds of blocks compile in seconds, the whole model in a minute
            torch.compiler.reset()  # another run's numbers, such as its capacity factor, would become variables
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.compile(dynamic=False)

    def on_fit_start(self) -> None:
        self.sums = {name: value.to(self.device) for name, value in self.sums.items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.config.cuda_graph and self.captured is None and graph.capturable(self):
            self.captured = graph.captured(self, batch)
        # What is random in a step (V-MoE's noise) depends on seed, step and rank alone, so a resumed run repeats it.
        torch.manual_seed(hash((self.config.seed, batch_idx, self.global_rank)))
        loss, aux_loss = (self.captured or self.losses)(batch)
        self.sums["loss"] += loss.detach()
        self.sums["aux_loss"] += aux_loss.detach()
        self.sums["count"] += 1
        return loss + aux_loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Loss as trained, and routed causally: by running cut-offs, nothing dropped.

        Never compiled: sizes of causal routing depend on the data, and each would be compiled anew.
        """
        with torch.compiler.set_stance("force_eager"):
            loss = self.loss(batch)
            if not self.routers:
                return {"val_loss": loss, "val_loss_causal": loss}
            with causal_routing(self.model):
                return {"val_loss": loss, "val_loss_causal": self.loss(batch)}

    def losses(self, batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss, and the sum of the layers' auxiliary losses, which the layers then forget: they hold on to the whole pass."""
        loss = self.loss(batch)
        aux = [layer.aux_loss for layer in self.model.moe_layers if layer.aux_loss is not None]
        for layer in self.model.moe_layers:
            layer.aux_loss = layer.router.aux_loss = None
        return loss, torch.stack(aux).sum() if aux else torch.zeros_like(loss)

    def loss(self, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, T + 1) token ids -> mean cross-entropy in nats per token."""
        tokens, tasks = (batch, None) if isinstance(batch, Tensor) else batch
        return self.model(tokens[:, :-1], tasks, targets=tokens[:, 1:])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for router in self.routers:  # running statistics move once a step, also under accumulation
            router.end_step()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.config.gradient_clip:  # Lightning's own refuses sharded models
            clip(self.parameters(), optimizer, self.config.gradient_clip)

    def configure_optimizers(self) -> dict[str, Any]:
        c = self.config
        if c.optimizer == "adamw":
            # With a GradScaler, a fused step would unscale gradients that were clipped while scaled.
            fused = self.device.type == "cuda" and c.strategy != "fsdp2" and c.precision != "16-mixed"
            keys = {"lr": c.learning_rate, "betas": (c.beta1, c.beta2), "weight_decay": c.weight_decay}
            optimizer = torch.optim.AdamW(self.parameters(), fused=fused or None, **keys)
        else:
            if c.strategy == "fsdp2":
                warnings.warn("torch's Adafactor is known to fail on sharded parameters; use adamw", stacklevel=2)
            # No first moment (beta1 = 0, as in the paper); its second moment decays as 1 - t^-0.8.
            optimizer = torch.optim.Adafactor(self.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(c, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What an exact resume needs beside weights, optimiser and loops; all ranks go on from the mean of their sums."""
        every = self.trainer.strategy.all_gather
        checkpoint["sums"] = {name: every(value).mean().cpu() for name, value in self.sums.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sums = dict(checkpoint["sums"])


class LitClassifier(LitModel):
    """Image classification; nothing is causal here.

    A batch is images (B, C, H, W) in [0, 1] and classes (B,) int64. Losses are nats per image.
    """

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss, and the share of images whose class got the largest logit."""
        images, labels = batch
        logits = self.model(images).float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"val_loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Images and classes -> mean cross-entropy in nats per image."""
        images, labels = batch
        return F.cross_entropy(self.model(images).float(), labels)


def clip(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale gradients down to a norm of at most max_norm, as clip_grad_norm_; call before every `optimizer.step()`.

    A fused optimiser does it itself in its next step, as it reads them, which saves a pass: it divides by its attribute
    grad_scale, made for GradScaler. Nothing waits for the device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if not optimizer.defaults.get("fused") or len({p.device for p in parameters}) != 1:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp_min(1)  # clip_grad_norm_'s factor, upside down


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """Share of the peak learning rate at an optimiser step (0 is the first).

    A linear warm-up; then constant, or the paper's inverse square root after `constant_steps`, or a linear
    decay to 0 over the last `decay_fraction` of the steps.
    """
    done = step + 1
    warm = min(done / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.schedule == "inverse_sqrt":
        return warm * math.sqrt(config.constant_steps / max(done, config.constant_steps))
    if config.schedule == "linear":
        length = max(config.decay_fraction * config.steps, 1.0)
        return warm * min((config.steps - step) / length, 1.0)
    return warm
