"""A text, continued by a trained run."""

from pathlib import Path

import torch

from ecmoe.config import RunConfig
from ecmoe.data.tokens import load as load_tokens
from ecmoe.model.generate import generate
from ecmoe.training.result import check_weights, find_run, load_model, read_run


def continue_text(run: str | Path, prompt: str, tokens: int, **sampling: object) -> str:
    """The prompt and what a trained run makes of it.

    Args:
        run: a finished run, as in `find_run`; its tokens must be in the cache, or its text at hand.
        prompt: at least one token. tokens, sampling: as in `generate`.

    Raises:
        FileNotFoundError: no finished run there. Damaged: a file of it isn't what was written. ValueError: as in `generate`;
        the run's text is another one here than its vocabulary was learned from, or it is no language model whose router
        reads tokens alone.
    """
    folder = find_run(run)
    check_weights(folder)
    summary = read_run(folder).summary
    config = RunConfig.from_dict(summary["config"])
    if config.images or "tasks" in config.needs:
        raise ValueError(f"{config.name}: only a language model whose router reads tokens alone can continue a text, "
                         f"but it has data={config.data!r} and router={config.router!r}")  # fmt: skip
    model = load_model(folder)
    loaded = load_tokens(config)
    if config.tokenizer == "bpe" and (summary["data"] or {}).get("digest") != loaded.meta["digest"]:
        raise ValueError(f"data={config.data!r} is another text here than the one that {config.name} was trained on, "
                         "and so is its vocabulary: bring that text back")  # fmt: skip
    ids = loaded.tokenizer.encode([prompt])[0]
    if not len(ids):
        raise ValueError(f"prompt={prompt!r}: must have at least one token, to be continued")
    out = generate(model, torch.tensor(ids.tolist()).long()[None], tokens, **sampling)
    return loaded.tokenizer.decode(out[0].tolist())
