"""Build the model of a config, count its parameters and FLOPs, and list the model sizes of Table 1."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecmoe.config import RunConfig
from ecmoe.model.transformer import Transformer, Trunk
from ecmoe.model.vision import VisionTransformer


def build_model(config: RunConfig | Mapping[str, Any], token_counts: Tensor | None = None) -> Trunk:
    """Return a config's model: a `Transformer`, (B, T) token ids -> (B, T, V) logits; for images a `VisionTransformer`.

    Each parameter has its own random generator, seeded by (config.seed, name): two configs with the same seed
    start from the same values in all parameters that they share.

    Args:
        config: the run's config, or its keys and values. token_counts: (V,) corpus frequencies, for hash_table=balanced.

    >>> config = RunConfig(layers=2, d_model=16, d_ff=32, heads=2, num_experts=4, sequence_length=16, batch_size=4)
    >>> build_model(config)(torch.randint(256, (4, 16))).shape
    torch.Size([4, 16, 256])
    """
    config = RunConfig.of(config)
    model: Trunk = VisionTransformer(config) if config.images else Transformer(config, token_counts)
    if not next(model.parameters()).is_meta:
        model.initialize(config.seed)
    return model


class Preset(NamedTuple):
    """A row of Table 1: a config, and the parameter counts that the paper prints."""

    config: RunConfig
    total: str
    active: str


def _preset(layers: int, d: int, f: int, heads: int, experts: int, total: str, active: str) -> Preset:
    keys = dict(layers=layers, d_model=d, d_ff=f, heads=heads, sequence_length=1024, batch_size=64)
    keys |= dict(tokenizer="bpe", vocab_size=256_000, data="c4", streaming=True)  # type: ignore[dict-item]
    router = dict(router="expert_choice", num_experts=experts) if experts else dict(router="dense")
    return Preset(RunConfig(**keys, **router), total, active)  # type: ignore[arg-type]


TABLE_1: dict[str, Preset] = {
    "0.1B": _preset(12, 768, 3072, 12, 0, "130M", "130M"),
    "0.1B/16E": _preset(12, 768, 3072, 12, 16, "548M", "145M"),
    "0.1B/32E": _preset(12, 768, 3072, 12, 32, "1.0B", "145M"),
    "0.1B/64E": _preset(12, 768, 3072, 12, 64, "1.9B", "145M"),
    "0.1B/128E": _preset(12, 768, 3072, 12, 128, "3.7B", "145M"),
    "8B": _preset(32, 4096, 16384, 32, 0, "8.7B", "8.7B"),
    "8B/64E": _preset(32, 4096, 16384, 32, 64, "143B", "9.8B"),
}


class Count(NamedTuple):
    """Numbers of parameters, without the embedding: in total, and those that an average token uses."""

    total: int
    active: int


def count_parameters(config: RunConfig) -> Count:
    """Count the parameters of a config's model on the meta device, without allocating memory."""
    if "token counts" in config.needs:  # the table is data, not parameters
        config = config.replace(hash_table="modulo")
    with torch.device("meta"):
        model = build_model(config.replace(kernels="plain"))
    total = sum(p.numel() for name, p in model.named_parameters() if name != "embedding.weight")
    experts = sum(layer.w1.numel() + layer.w2.numel() for layer in model.moe_layers)
    offered = config.row.experts_per_token(config.to_dict())
    return Count(total, round(total - experts + experts * offered / config.num_experts))


def flops_per_token(config: RunConfig) -> float:
    """Return training FLOPs per token: 6 N_active (with output layer, without embedding) + 6 L T d (causal attention).

    Per patch of an image, attention takes 12 L T d, and the head is counted as if it ran for every patch.
    """
    active = count_parameters(config).active
    attention = 6 * config.layers * config.sequence_length * config.d_model
    if config.images:
        return 6 * active + 2 * attention
    return 6 * (active + config.vocab_size * config.d_model) + attention
