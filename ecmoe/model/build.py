"""From a config to its model: built, counted, and the sizes of Table 1."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecmoe.config import RunConfig
from ecmoe.model.transformer import Transformer, Trunk
from ecmoe.model.vision import VisionTransformer


def build_model(config: RunConfig, token_counts: Tensor | None = None) -> Trunk:
    """The model of a config, its initial values drawn from config.seed.

    Every parameter has a generator of its own, seeded by (seed, name): two configs with the same seed
    start from the same values in all parameters that they share.

    Args:
        config: checked already. token_counts: (V,) corpus frequencies, for hash_table=balanced.

    Returns:
        a `Transformer`, (B, T) token ids -> (B, T, V) logits; of images a `VisionTransformer`.

    >>> config = RunConfig(layers=2, d_model=16, d_ff=32, heads=2, num_experts=4, sequence_length=16, batch_size=4)
    >>> build_model(config)(torch.randint(256, (4, 16))).shape
    torch.Size([4, 16, 256])
    """
    model = _new_model(config, token_counts)
    if not next(model.parameters()).is_meta:
        model.initialize(config.seed)
    return model


def _new_model(config: RunConfig, token_counts: Tensor | None = None) -> Trunk:
    return VisionTransformer(config) if config.images else Transformer(config, token_counts)


class Preset(NamedTuple):
    """A row of Table 1: the config's keys, and the parameters that the paper prints."""

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
    """Parameters without the embedding: all, and those that an average token passes through."""

    total: int
    active: int


def count_parameters(config: RunConfig) -> Count:
    """Count on the meta device: nothing is allocated, whatever the size."""
    if "token counts" in config.needs:  # the table is data, not parameters
        config = config.replace(hash_table="modulo")
    with torch.device("meta"):
        model = _new_model(config)
    total = sum(p.numel() for name, p in model.named_parameters() if name != "embedding.weight")
    experts = sum(layer.w1.numel() + layer.w2.numel() for layer in model.moe_layers)
    offered = config.row.experts_per_token(config.to_dict())
    return Count(total, round(total - experts + experts * offered / config.num_experts))


def flops_per_token(config: RunConfig) -> float:
    """Training FLOPs of a token: 6 N_active (output layer in, embedding out) + 6 L T d of causal attention.

    Of a patch: attention to all tokens takes twice as much; the head, once an image, is counted as if once a patch.
    """
    active = count_parameters(config).active
    attention = 6 * config.layers * config.sequence_length * config.d_model
    if config.images:
        return 6 * active + 2 * attention
    return 6 * (active + config.vocab_size * config.d_model) + attention
