"""Continue a text with the model of a trained run."""

from pathlib import Path

import torch

from ecmoe.data.tokens import load as load_tokens
from ecmoe.model.generate import generate
from ecmoe.training.result import find_run, load_model, read_run


def continue_text(run: str | Path, prompt: str, tokens: int, **sampling: object) -> str:
    """Return the prompt, a text of at least one token, and its continuation by a finished run (as in `find_run`), whose
    tokenised corpus must be in the cache, or its text available. tokens, sampling: as in `generate`.

    Raises a FileNotFoundError if there is no such finished run; Damaged if a file of it was changed; a ValueError as
    `generate` does, or if the run isn't a language model, needs tasks, or learned its vocabulary from another text."""
    folder = find_run(run)
    model = load_model(folder)
    config = model.config
    if config.images or "tasks" in config.needs:
        raise ValueError(f"{config.name}: only a language model whose router needs no tasks can continue a text, "
                         f"but it has data={config.data!r} and router={config.router!r}")  # fmt: skip
    loaded, trained_on = load_tokens(config), read_run(folder).summary["data"] or {}
    if config.tokenizer == "bpe" and trained_on.get("digest") != loaded.meta["digest"]:
        raise ValueError(f"data={config.data!r} differs from the text that {config.name} was trained on, "
                         "and so does its vocabulary: restore the files")  # fmt: skip
    ids = loaded.tokenizer.encode([prompt])[0]
    if not len(ids):
        raise ValueError(f"prompt={prompt!r}: must have at least one token, to be continued")
    out = generate(model, torch.tensor(ids.tolist()).long()[None], tokens, **sampling)
    return loaded.tokenizer.decode(out[0].tolist())
