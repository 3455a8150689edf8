"""Fine-tune a trained model, with a linear head on its last token, on a classification task (claim C4).

The paper doesn't state its procedure, so this one is ours: the decoder reads an example's texts once, and all compared
configs (arms) and tasks use the same learning rate.

Letters: N examples of T tokens, padded on the right; batches of B; width d; C classes.
"""

import base64
import copy
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ecmoe.config import RunConfig
from ecmoe.data import tasks, tokens
from ecmoe.data.batches import Batches, batch_of
from ecmoe.data.tokenizer import Tokenizer
from ecmoe.model.transformer import Transformer
from ecmoe.routing import causal_routing, routers
from ecmoe.training.lit import LitModel
from ecmoe.training.trainer import new_trainer, repeatable

SEPARATOR = "\n"  # appended to each text of an example
ROUND = 16  # T is rounded up to a multiple of ROUND; if blocks are compiled, once per T, to one of 128, 512, 2048, ...
# Tokenised examples: (N, T) tokens, (N,) lengths without padding, (N,) labels; int64.
Encoded = tuple[Tensor, Tensor, Tensor]


def fine_tuned(
    model: Transformer,
    config: RunConfig,
    *,
    task: str,
    folder: str | None = None,
    steps: int = 300,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    examples: int | None = None,
) -> dict[str, Any]:
    """Fine-tune a copy of the model on a task's training examples, and return its accuracy on the validation examples.

    task, folder: as in `tasks.load`. steps: of AdamW, with warm-up in the first tenth, then linear decay to 0. batch_size:
    examples in a batch, also in validation, where tokens compete in expert choice, too. examples: maximum number of
    training and of validation examples; None: all.

    Returns rows: one row: `accuracy`; `accuracy_causal`, with causal routing; `majority`, share of the most frequent class;
    `truncated`, share of examples longer than the model's sequence; `train`, `validation`, numbers of examples. right,
    right_causal: a bit per validation example, 1 if correct (packed, base64), to compare arms by example."""
    if config.images or "tasks" in config.needs:
        raise ValueError(f"{config.name}: only a language model whose router reads tokens alone can be fine-tuned")
    sides = [tasks.Examples(*(part[:examples] for part in side)) for side in tasks.load(task, folder)]
    if (has := len(sides[0].labels)) < batch_size:
        raise ValueError(f"task {task!r}: batch_size={batch_size} is more than its {has} training examples")
    (train, validation), truncated = _encode(tokens.load(config).tokenizer, sides, config.sequence_length)
    # Compile blocks separately for each size, with numbers as constants.
    compiling = torch._dynamo.config.patch(recompile_limit=64, specialize_float=True)
    with torch.random.fork_rng(), repeatable(), compiling, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", module="lightning.*")
        torch.manual_seed(config.seed)
        tuned = LitFineTuning(copy.deepcopy(model), config, tasks.TASKS[task].classes, learning_rate, steps)
        trainer = new_trainer(config, max_steps=steps, inference_mode=False)
        # Otherwise Lightning moves weights and moments to the host after each loop: 30 GB a task at the paper's size.
        trainer.strategy.teardown = lambda: None  # type: ignore[method-assign]
        trainer.fit(tuned, DataLoader(Batches(train, batch_size, config.seed), batch_size=None))
        found = causally = right(trainer, tuned, validation, batch_size)
        if routers(tuned.model):
            with causal_routing(tuned.model):
                causally = right(trainer, tuned, validation, batch_size)
    row = {"task": task, "accuracy": float(found.double().mean()), "accuracy_causal": float(causally.double().mean())}
    row |= {"majority": float(validation[2].bincount().max() / len(found))}
    row |= {"train": len(train[2]), "validation": len(found), "truncated": truncated}
    return {"rows": [row], "right": _packed(found), "right_causal": _packed(causally)}


class LitFineTuning(L.LightningModule):
    """A trained model with a new classification head: tokens (B, T), lengths (B,) -> logits (B, C)."""

    # Optimiser, schedule and clipping are those of a run with the config below.
    configure_optimizers = LitModel.configure_optimizers
    configure_gradient_clipping = LitModel.configure_gradient_clipping

    def __init__(self, model: Transformer, config: RunConfig, classes: int, learning_rate: float, steps: int) -> None:
        super().__init__()
        warm = max(steps // 10, 1)
        self.model, self.config = model.train(), config.replace(
            optimizer="adamw", learning_rate=learning_rate, beta1=0.9, beta2=0.999, weight_decay=0.0, gradient_clip=1.0,
            steps=steps, warmup_steps=warm, schedule="linear", decay_fraction=max(steps - warm, 1) / steps,
        )  # fmt: skip
        if config.compile:
            model.compile_blocks()
        self.head = nn.Linear(config.d_model, classes)
        for p in self.head.parameters():
            nn.init.zeros_(p)  # start with equal probabilities, whatever the seed

    def on_before_batch_transfer(self, batch: Encoded, dataloader_idx: int) -> Encoded:
        """Cut or pad a batch to the length of its longest example, rounded up as `ROUND` says."""
        tokens, lengths, labels = batch
        longest = int(lengths.max())
        T = -(-longest // ROUND) * ROUND
        if self.config.compile:
            T = 128
            while T < longest:
                T *= 4
            T = min(T, self.config.sequence_length)
        return F.pad(tokens[:, :T], (0, max(T - tokens.shape[1], 0))), lengths, labels

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        # No expert takes padding, and it is after all tokens. (`hidden` would check that, and wait for the device.)
        hidden = self.model.through(self.model.embedding(tokens), token_ids=tokens, mask=mask)
        last = (lengths - 1).clamp_min(0)
        return self.head(hidden[torch.arange(len(tokens), device=tokens.device), last])

    def training_step(self, batch: Encoded, batch_idx: int) -> Tensor:
        tokens, lengths, labels = batch
        loss = F.cross_entropy(self(tokens, lengths).float(), labels)
        return loss + sum(layer.aux_loss for layer in self.model.moe_layers if layer.aux_loss is not None)

    def predict_step(self, batch: Encoded, batch_idx: int) -> Tensor:
        """Return whether each example is classified correctly, (B,) bool."""
        tokens, lengths, labels = batch
        with torch.compiler.set_stance("force_eager"):  # in causal routing, shapes depend on the data
            return self(tokens, lengths).argmax(dim=1) == labels


def right(trainer: L.Trainer, tuned: LitFineTuning, examples: Encoded, batch_size: int) -> Tensor:
    """Return which examples are classified correctly, (N,) bool; the last batch is filled with padding."""
    N = len(examples[0])
    filled = [F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -N % batch_size)) for x in examples]
    batches = [batch_of(filled, slice(i, i + batch_size)) for i in range(0, N, batch_size)]
    return torch.cat(trainer.predict(tuned, DataLoader(batches, batch_size=None)))[:N].cpu()


def _packed(bits: Tensor) -> str:
    return base64.b64encode(np.packbits(bits.numpy()).tobytes()).decode()


def _encode(tokenizer: Tokenizer, sides: list[tasks.Examples], most: int) -> tuple[list[Encoded], float]:
    """Tokenise and join each example's texts, cut to `most` tokens; return the examples, and the share of those cut."""
    found, cut = [], []
    for part in sides:
        ids = iter(tokenizer.encode([text + SEPARATOR for texts in part.texts for text in texts]))
        pieces = [[next(ids).tolist() for _ in texts] for texts in part.texts]
        cut += [sum(map(len, some)) > most for some in pieces]
        rows = [torch.tensor(_fitted(some, most)) for some in pieces]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        tokens = F.pad(tokens, (0, -tokens.shape[1] % ROUND))
        found.append((tokens, torch.tensor([len(row) for row in rows]), torch.from_numpy(part.labels)))
    return found, sum(cut) / len(cut)


def _fitted(pieces: list[list[int]], most: int) -> list[int]:
    """Join texts into at most `most` tokens: drop tokens from the beginning of the longest text, until all fit."""
    while (over := sum(map(len, pieces)) - most) > 0:
        *_, second, longest = [0, *sorted(map(len, pieces))]
        which = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        pieces[which] = pieces[which][min(over, max(longest - second, 1)) :]
    return [i for piece in pieces for i in piece]
