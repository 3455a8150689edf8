"""The Transformer of section 3.4: decoder-only, with an MoE as the FFN of every other layer; and its dense counterpart.

From the paper: relative position bias in each layer, GELU-gated FFNs where there are no experts. Our choices, where
the paper is silent: RMSNorm before attention and FFN, no biases, T5's buckets, tied embeddings, initial values.

Letters: B sequences of T tokens, width d, h heads, V vocabulary, L layers.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ecmoe.config import RunConfig
from ecmoe.model.attention import Attention, RelativeBias
from ecmoe.model.cross_entropy import linear_cross_entropy
from ecmoe.model.moe import MoE
from ecmoe.routing import build_router

Cache = list[list[Tensor]]  # per block: keys and values of the tokens seen so far


class Trunk(nn.Module):
    """An embedding, blocks and a final norm; and the initialisation of all parameters."""

    def __init__(self, config: RunConfig, embedding: nn.Module, token_counts: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.blocks = nn.ModuleList(Block(config, layer, token_counts) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model)

    def through(self, x: Tensor, cache: Cache | None = None, **known: Tensor | None) -> Tensor:
        """Apply all blocks and the final norm to (B, T, d) embeddings. known: further inputs of `MoE`, such as mask."""
        update = None
        for layer, block in enumerate(self.blocks):
            x, update = block(x, update, cache[layer] if cache else None, **known)
        return self.norm(x + update)  # type: ignore[operator]

    @property
    def moe_layers(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def compile_blocks(self) -> None:
        """Compile block by block, for static sizes: two kinds of blocks take seconds, the whole model a minute."""
        for block in self.blocks:
            block.compile(dynamic=False)
        for layer in self.moe_layers:
            if layer.router.across:  # its sizes depend on the values of all ranks' tokens
                layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]

    def initialize(self, seed: int) -> None:
        """Draw each parameter from its own generator, seeded by (seed, name)."""
        with ThreadPoolExecutor() as pool:  # a core draws 100 million numbers a second, and 0.1B/64E has 1.8 billion
            list(pool.map(lambda named: self._draw(seed, *named), self.named_parameters()))
        if self.config.relative_init == "alibi":
            for module in self.modules():
                if isinstance(module, RelativeBias):
                    module.weight.data.copy_(module.falling())

    @torch.no_grad()
    def _draw(self, seed: int, name: str, parameter: Tensor) -> None:
        std = self._initial_std(name, parameter)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if std is None:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))

    def _initial_std(self, name: str, parameter: Tensor) -> float | None:
        """Return fan-in^-1/2 (None: fill with ones), times (2L)^-1/2 for outputs of blocks, whose sum starts near 1."""
        if name.endswith("norm.weight"):
            return None
        if name.endswith("relative.weight"):
            return 0.1
        if name == "embedding.weight":
            return self.config.d_model**-0.5
        if name.endswith(("moe.w2", "attention.out.weight", "ffn.down.weight")):
            std = parameter.shape[1] ** -0.5 * (2 * self.config.layers) ** -0.5
            return std * self.config.moe_init_scale if name.endswith("moe.w2") else std
        # nn.Linear weights are (out, in); in experts, (e, in, out), and routers, (in, out), fan-in is second to last.
        return parameter.shape[1 if name.endswith((".qkv.weight", "_up.weight")) else -2] ** -0.5


class Transformer(Trunk):
    """Decoder-only language model: (B, T) token ids -> (B, T, V) logits."""

    embedding: nn.Embedding

    def __init__(self, config: RunConfig, token_counts: Tensor | None = None) -> None:
        super().__init__(config, nn.Embedding(config.vocab_size, config.d_model), token_counts)

    def forward(
        self,
        token_ids: Tensor,
        task_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits of the next token; or, given targets (B, T) int64, their mean cross-entropy, without those where
        mask is False. See `hidden`."""
        x = self.hidden(token_ids, task_ids, mask, cache)
        if mask is not None and targets is not None:
            x, targets = x[mask], targets[mask]
        return self.logits(x) if targets is None else linear_cross_entropy(x, self.embedding.weight, targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the (..., d) output of `hidden` to (..., V) logits, tied to the embedding."""
        return F.linear(hidden, self.embedding.weight)

    def hidden(
        self,
        token_ids: Tensor,
        task_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the (B, T, d) input of the output layer.

        Args:
            token_ids: (B, T) int64. task_ids: (B,) or (B, T).
            mask: (B, T) bool, False for padding; a ValueError if it precedes a token, which would attend to it, or may,
                as with a cache.
            cache: keys and values of earlier tokens, at first `[[] for _ in model.blocks]`; updated in place.
        """
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}: must be (B, T)")
        if mask is not None and mask.shape != token_ids.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {tuple(token_ids.shape)}, as token_ids")
        if mask is not None and not torch.compiler.is_compiling():
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise ValueError(
                    "mask has padding before a token: pad on the right, as tokens attend to all before them"
                )
            if cache is not None and not bool(mask.all()):
                raise ValueError("mask has padding, and there is a cache: later tokens would attend to the padding")
        # Embeddings are small compared with the blocks' outputs, so that tied logits don't start at the input token.
        return self.through(self.embedding(token_ids), cache, token_ids=token_ids, task_ids=task_ids, mask=mask)


class Block(nn.Module):
    """Attention, then an MoE or a gated FFN, each applied to the normalised residual stream.

    The output of the MoE or FFN is added by the next block: when compiled, the sum fuses with that block's norm.
    """

    def __init__(self, config: RunConfig, layer: int, token_counts: Tensor | None = None) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.attention_norm, self.ffn_norm = nn.RMSNorm(config.d_model), nn.RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.moe: MoE | None = None
        self.ffn: GatedFFN | None = None
        if config.row.layer is not None and layer % config.moe_every == config.moe_every - 1:
            router = build_router(config, token_counts)
            self.moe = MoE(router, config.d_model, config.d_ff, recompute=self.recompute, kernels=config.kernels)
        else:
            self.ffn = GatedFFN(config.d_model, config.d_ff)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        past: list[Tensor] | None = None,
        **known: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if update is not None:
            x = x + update
        x = x + self._maybe_recomputed(lambda y: self.attention(self.attention_norm(y), past), x)
        if self.moe is not None:  # MoE recomputes its experts itself, and stores the routing
            return x, self.moe(self.ffn_norm(x), **known)
        return x, self._maybe_recomputed(lambda y: self.ffn(self.ffn_norm(y)), x)  # type: ignore[misc]

    def _maybe_recomputed(self, function, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=False) if self.recompute and self.training else function(x)


class GatedFFN(nn.Module):
    """GELU-gated linear unit with three matrices (section 3.4; Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, d_ff, bias=False)
        self.value_up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate_up(x), approximate="tanh") * self.value_up(x))
