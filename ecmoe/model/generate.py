"""Generation: token by token with a key-value cache, routed causally, so a batch of one works."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ecmoe.model.transformer import KeyValueCache, Transformer
from ecmoe.routing import causal_routing


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue prompts.

    Args:
        model: trained; expert choice routes by the cut-offs that it gathered in training.
        prompt: (B, T) int64, T at least 1. tokens: how many to add.
        temperature: 0 takes the most likely token. top_k: sample among the k most likely ones only.

    Returns:
        (B, T + tokens).

    Raises:
        ValueError: an empty prompt, a bad setting, or a model without cut-offs.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}: must be (B, T) with at least one token")
    if tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"tokens={tokens}, temperature={temperature}, top_k={top_k}: must not be negative; top_k at least 1"
        )
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    cache = KeyValueCache(len(model.blocks))
    was_training = model.training
    model.eval()
    out = new = prompt
    with causal_routing(model):
        for _ in range(tokens):
            logits = model(new, cache=cache)[:, -1].float()  # (B, V)
            new = _sample(logits, temperature, top_k, generator)
            out = torch.cat([out, new], dim=1)
    model.train(was_training)
    return out


def continue_text(run: str | Path, prompt: str, tokens: int, **sampling: object) -> str:
    """The prompt and what a trained run makes of it.

    Args:
        run: folder of a finished run; its tokens must be in the cache, or its text at hand.
        prompt: at least one token. tokens, sampling: as in `generate`.

    Raises:
        FileNotFoundError: no finished run there. ValueError: as in `generate`; the run's weights are damaged, its text
        is another one here than its vocabulary was learned from, or it is no language model whose router reads tokens alone.
    """
    from safetensors import SafetensorError

    from ecmoe.config import RunConfig
    from ecmoe.data.batches import TextData
    from ecmoe.training.result import read_run
    from ecmoe.training.run import load_model

    run = Path(run)
    if not (run / "model.safetensors").exists():
        raise FileNotFoundError(f"run {str(run)!r} holds no model.safetensors: name the folder of a finished run")
    config = RunConfig.from_yaml(run / "config.yaml")
    if config.images or config.router == "task_level":
        raise ValueError(f"{config.name}: only a language model whose router reads tokens alone can continue a text, "
                         f"but it has data={config.data!r} and router={config.router!r}")  # fmt: skip
    try:
        model = load_model(run)
    except SafetensorError as error:
        raise ValueError(
            f"{run / 'model.safetensors'} is damaged ({error}): delete the folder, and train the run again"
        ) from error
    data = TextData(config)
    data.prepare_data()
    data.setup()
    if config.tokenizer == "bpe" and (read_run(run).summary["data"] or {}).get("digest") != data.digest:
        raise ValueError(f"data={config.data!r} is another text here than the one that {config.name} was trained on, "
                         "and so is its vocabulary: bring that text back")  # fmt: skip
    out = generate(model, torch.tensor([data.encode(prompt)]).long(), tokens, **sampling)
    return data.decode(out[0].tolist())


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """(B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
