"""RunConfig, the only schema of a training run: a flat, frozen dataclass that validates its values.

Letters follow the paper: n tokens compete for e experts, and each expert takes k = n c / e tokens (Eq. 1)."""

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, ClassVar, Self

from ecmoe.files import ConfigError, check_sum, nearest, read_yaml
from ecmoe.paths import IMAGES, IMAGES_PREFIX, MIX_PREFIX, content_of, is_local, parts_of, with_content
from ecmoe.routers import ROUTERS, RouterRow

# Part of every run's digest: increase it when the meaning of a config or of a result changes.
SCHEMA = 1
LARGEST = 2**63 - 1  # the largest int64, PyTorch's widest integer type


def key(default: Any, help: str, *, low: float | None = None, high: float | None = None, above: float | None = None,
        below: float | None = None, choices: Collection[str] | None = None) -> Any:  # fmt: skip
    """Declare a config key. Values may equal the bounds low and high, but must lie strictly between above and below."""
    meta = {"help": help, "low": low, "high": high, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


def bare_data(data: str) -> str:
    """Return the value of the key `data` without folders, so that a copy of the files elsewhere is the same data."""
    kind = next((kind for kind in (IMAGES_PREFIX, MIX_PREFIX) if data.startswith(kind)), "")
    parts = parts_of(data.removeprefix(IMAGES_PREFIX))
    names = [Path(part).name if is_local(part) else part for part in parts]
    return kind + ",".join(names) + content_of(data)


# Keys that affect how a run is monitored or executed, but not what it computes; they are not part of its identity.
_NOT_IDENTITY = {"eval_every", "checkpoint_every", "compile", "cuda_graph", "kernels", "activation_checkpointing"}
# Keys that only text runs, or only image runs, read; the identity of the other kind of run leaves them out.
_TEXT_KEYS = {"streaming", "max_bytes", "tokenizer", "vocab_size", "relative_buckets", "relative_max_distance",
              "relative_init"}  # fmt: skip
_IMAGE_KEYS = {"patch_size", "channels", "classes", "augment"}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a training run, as flat keys. `ecmoe keys` lists them.

    The defaults are EC-CF2 (expert choice, capacity factor 2) on the corpus `stdlib`, small enough to train on a CPU.
    An invalid value raises a ConfigError on construction, which names the key, the value and what would be right."""

    # Not a key: "module:function" that trains runs of this class; same arguments as `ecmoe.training.run.train_run`.
    trained_by: ClassVar[str] = "ecmoe.training.run:train_run"

    # Routing
    router: str = key("expert_choice", "routing algorithm (see ecmoe/routers.py); dense: no experts", choices=ROUTERS)
    num_experts: int = key(8, "e, number of experts in an MoE layer", low=1)
    capacity_factor: float | None = key(
        2.0, "c: mean number of experts per token (expert choice); capacity relative to an equal share, null: "
        "unlimited (token choice, hash, k-means)", above=0)  # fmt: skip
    top_k: int = key(2, "token choice: number of experts that each token chooses (Switch: 1, GShard: 2)", low=1)
    gate: str = key("softmax", "weights of expert outputs: softmax (Eq. 4), renormalized (sum to 1 per token), "
                    "scaled (softmax x e/c, or x e/top_k)", choices=("softmax", "renormalized", "scaled"))  # fmt: skip
    pool: str | int = key("batch", "expert choice: tokens that compete: batch (of all ranks), rank (a rank's batch), "
                          "sequence, position, or a number of tokens", low=1,
                          choices=("batch", "rank", "sequence", "position"))  # fmt: skip
    max_experts_per_token: int | None = key(None, "b, expert choice: most experts per token (3.3); null: no cap", low=1)
    cap_solver: str = key("feasible", "algorithm for max_experts_per_token: feasible (ours), dykstra (the paper's)",
                          choices=("feasible", "dykstra"))  # fmt: skip
    priority: str = key("order", "token choice: which tokens a full expert keeps: order (the first), score (the highest; V-MoE)",
                        choices=("order", "score"))  # fmt: skip
    balance: str = key("switch", "token choice: load balancing: switch, first_choice (GShard), importance_load (V-MoE), "
                       "bias (no loss; Wang et al. 2024), none",
                       choices=("switch", "first_choice", "importance_load", "bias", "none"))  # fmt: skip
    aux_loss_weight: float = key(0.01, "weight of the load-balancing loss (GLaM: 0.01)", low=0)
    z_loss_weight: float = key(0.0, "weight of the router z-loss", low=0)
    hash_table: str = key("modulo", "hash: expert of a token: modulo (token id mod e), balanced (equal loads, from token counts)",
                          choices=("modulo", "balanced"))  # fmt: skip
    num_tasks: int = key(4, "task_level: number of tasks; for text, classes of sequences found by k-means", low=1)
    task_table: str = key("learned", "task_level: expert of a task: learned or fixed", choices=("learned", "fixed"))
    threshold_beta: float = key(0.999, "expert_threshold: decay of the thresholds' moving average", low=0, below=1)

    # Model (section 3.4)
    layers: int = key(4, "number of Transformer layers", low=1, high=10_000)
    d_model: int = key(64, "d, width of the model", low=1)
    d_ff: int = key(128, "hidden width of each expert, and of the gated FFN in layers without experts", low=1)
    heads: int = key(4, "number of attention heads; must divide d_model", low=1)
    moe_every: int = key(2, "an MoE layer every so many layers (section 3.4: 2)", low=1)
    moe_init_scale: float = key(1.0, "scale of the experts' initial output weights (not stated in the paper)", low=0)
    relative_buckets: int = key(32, "number of buckets of the relative position bias (as in T5)", low=2, high=1_000_000)
    relative_max_distance: int = key(128, "distance from which all tokens share a bucket (T5)", low=2, high=1_000_000)
    relative_init: str = key("alibi", "initial relative position bias: alibi (decreases with distance), normal (std "
                             "0.1); not stated in the paper", choices=("alibi", "normal"))  # fmt: skip

    # Data
    data: str = key(
        "stdlib", "stdlib, c4, wikitext-103, enwik8, hub:NAME, a path to .txt, .txt.xz, .jsonl, or mix:A,B (equal shares); "
        "images: digits, cifar10, images:PATH. Local paths get #SHA256 of their content")  # fmt: skip
    streaming: bool = key(False, "stream a data set from the Hugging Face Hub instead of downloading it")
    max_bytes: int = key(0, "most bytes of text to read; 0: no limit", low=0)
    tokenizer: str = key("bytes", "bytes, or bpe (byte-pair encoding, trained on the corpus)", choices=("bytes", "bpe"))
    vocab_size: int = key(256, "V, number of tokens in the vocabulary; must be 256 with tokenizer: bytes", low=2)
    sequence_length: int = key(128, "T, tokens of a sequence (paper: 1024) or patches of an image", low=1, high=2**24)
    patch_size: int = key(2, "images: side of a patch, in pixels", low=1)
    channels: int = key(1, "images: colour channels, 1 or 3", low=1)
    classes: int = key(10, "images: number of classes", low=2)
    augment: bool = key(False, "images: randomly shift (by up to 1/8 of the height) and mirror training images")

    # Training
    seed: int = key(0, "random seed of the initial weights and the order of the batches", low=0)
    batch_size: int = key(16, "B, sequences (or images) in a micro-batch on one device", low=1)
    accumulate: int = key(1, "micro-batches per optimiser step (gradient accumulation)", low=1)
    steps: int = key(60, "number of optimiser steps", low=1)
    optimizer: str = key("adamw", "adamw, or adafactor (as in the paper, but with decay t^-0.8 instead of 0.99)",
                         choices=("adamw", "adafactor"))  # fmt: skip
    learning_rate: float = key(3e-3, "peak learning rate (not stated in the paper)", low=0, high=1e30)
    beta1: float = key(0.9, "adamw: decay of the first moment (the paper's Adafactor: 0)", low=0, below=1)
    beta2: float = key(0.99, "adamw: decay of the second moment (the paper's Adafactor: 0.99)", low=0, below=1)
    weight_decay: float = key(0.0, "weight decay of adamw or adafactor (not stated in the paper)", low=0, high=1e6)
    gradient_clip: float = key(1.0, "clip the gradient norm to this value (GLaM: 1.0); 0: no clipping", low=0)
    schedule: str = key("constant", "learning rate after the warm-up: constant, inverse_sqrt (the paper), linear (decay to 0)",
                        choices=("constant", "inverse_sqrt", "linear"))  # fmt: skip
    warmup_steps: int = key(10, "steps of linear learning-rate warm-up (not stated in the paper)", low=0)
    constant_steps: int = key(10_000, "inverse_sqrt: steps before the decay (the paper: 10,000)", low=1)
    decay_fraction: float = key(0.2, "linear: last share of the steps, in which the rate decays to 0", low=0, high=1)
    eval_every: int = key(20, "steps between validations", low=1)
    eval_batches: int = key(8, "number of validation batches, the same for every run", low=1)
    checkpoint_every: int = key(1000, "steps between checkpoints", low=1)

    # Machine
    precision: str = key("auto", "number format, as in Lightning; auto: bf16-mixed on a GPU, 32-true on a CPU", choices=(
        "auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"))  # fmt: skip
    compile: bool = key(False, "compile each block of the model with torch.compile")
    cuda_graph: bool = key(False, "run training steps as a CUDA graph where possible: one GPU, a router whose sizes "
                           "don't depend on data")  # fmt: skip
    kernels: str = key("auto", "implementation of the MoE layer: plain (PyTorch), triton, triton-bmm or cute (CUDA GPU only; "
                       "cute: pip install 'quack-kernels[cu13]'), auto (triton where possible)", choices=(
        "auto", "plain", "triton", "triton-bmm", "cute"))  # fmt: skip
    activation_checkpointing: bool = key(False, "save memory: recompute attention and experts in the backward pass")
    strategy: str = key("auto", "distribution over ranks: ddp (copies), fsdp2 (sharded weights), ep (experts divided, "
                        "the rest as fsdp2), auto (ddp)", choices=("auto", "ddp", "fsdp2", "ep"))  # fmt: skip
    devices: int = key(1, "processes (GPUs) per node; several nodes: torchrun -m ecmoe train", low=1, high=1024)
    num_nodes: int = key(1, "number of nodes (machines)", low=1, high=65_536)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.d_model % self.heads:
            raise ConfigError(f"heads={self.heads}: must divide d_model={self.d_model}")
        if self.row.layer is not None and self.layers < self.moe_every:
            raise ConfigError(f"moe_every={self.moe_every} with layers={self.layers}: no layer would have experts; lower "
                              "moe_every, or add layers")  # fmt: skip
        parts = parts_of(self.data)
        wrong = len(set(parts)) < max(2, len(parts)) or not all(parts) or any(map(_of_images, parts))
        if self.data.startswith(MIX_PREFIX) and wrong:
            raise ConfigError(f"data={self.data!r}: must be {MIX_PREFIX} followed by at least two different texts, separated "
                              f"by commas, such as {MIX_PREFIX}data/a.txt,data/b.txt; images can't be mixed")  # fmt: skip
        if not all(Path(part.removeprefix(IMAGES_PREFIX)).name for part in parts):  # part of the run's identity
            raise ConfigError(f"data={self.data!r}: must be a known corpus, known images, or a path that ends in a file "
                              f"or folder name, such as data/book.txt; for a folder of images {IMAGES_PREFIX}PATH")  # fmt: skip
        if not self.images and (self.vocab_size != 256 if self.tokenizer == "bytes" else self.vocab_size < 257):
            raise ConfigError(f"vocab_size={self.vocab_size} with tokenizer={self.tokenizer}: must be 256 with bytes, and "
                              "at least 257 with bpe (256 bytes and a merge)")  # fmt: skip
        if self.images and self.needs:
            others = ", ".join(name for name, other in ROUTERS.items() if not other.needs(vars(self)))
            raise ConfigError(f"router={self.router!r} with data={self.data!r}: it routes by {' and '.join(self.needs)}, which "
                              f"images don't have; use one of {others}")  # fmt: skip
        if self.strategy == "ep" and (self.row.layer is None or self.num_experts % self.ranks):
            raise ConfigError(f"strategy='ep' with router={self.router!r}, num_experts={self.num_experts}: each of devices x num_nodes="
                              f"{self.ranks} ranks holds an equal number of experts; make num_experts divisible, or use fsdp2")  # fmt: skip
        if self.sharded and self.optimizer == "adafactor":
            raise ConfigError(f"optimizer='adafactor' with strategy={self.strategy!r}: Adafactor reads whole matrices, but a rank "
                              "has only parts of them; use adamw, or strategy: ddp")  # fmt: skip
        self.row.check(self)
        object.__setattr__(self, "data", with_content(self.data))  # so that a changed text gives a different run

    @property
    def row(self) -> RouterRow:
        """The router's row in `ROUTERS`: its class, the keys that it reads, and its checks."""
        return ROUTERS[self.router]

    @property
    def needs(self) -> tuple[str, ...]:
        """Inputs that the router needs besides the tokens, out of "token ids", "token counts" and "tasks"."""
        return self.row.needs(vars(self))

    @property
    def images(self) -> bool:
        """Whether the run classifies images instead of modelling text."""
        return _of_images(self.data)

    @property
    def tokens_per_batch(self) -> int:
        """Number of tokens in an optimiser step, over all ranks."""
        return self.batch_size * self.sequence_length * self.accumulate * self.ranks

    @property
    def sharded(self) -> bool:
        """Whether each rank stores only a part of the weights."""
        return self.strategy in ("fsdp2", "ep")

    @property
    def ranks(self) -> int:
        """Number of processes that train the run together."""
        return self.devices * self.num_nodes

    @property
    def weights_at_least(self) -> int:
        """Lower bound on the number of parameters, without building the model: matrices only, no routers or norms."""
        experts = 0 if self.row.layer is None else self.layers // self.moe_every
        d, f = self.d_model, self.d_ff
        ends = self.patch_size**2 * self.channels + self.classes if self.images else self.vocab_size
        ffns = experts * self.num_experts * 2 * f + (self.layers - experts) * 3 * f
        return d * (self.layers * 4 * d + ffns + ends)

    @property
    def pool_tokens(self) -> int:
        """n, the number of tokens that compete for an expert (Eq. 1); a ConfigError if `pool` doesn't fit the batch."""
        batch = self.batch_size * self.sequence_length
        if isinstance(self.pool, int):
            if self.pool % self.sequence_length or batch % self.pool:
                raise ConfigError(f"pool={self.pool}: must be a multiple of sequence_length={self.sequence_length} and divide "
                                  f"the {batch} tokens of a batch (batch_size x sequence_length)")  # fmt: skip
            return self.pool
        if self.pool == "position":
            return self.batch_size * self.ranks
        return {"batch": batch * self.ranks, "rank": batch, "sequence": self.sequence_length}[self.pool]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from flat keys. An unknown key raises a ConfigError that suggests the nearest known key."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name, value in values.items():
            if name not in names:
                hint = nearest(name, names, "`ecmoe keys` lists the keys")
                raise ConfigError(f"unknown key {name!r} with value {value!r}: {hint}")
        return cls(**values)

    @classmethod
    def of(cls, given: "RunConfig | Mapping[str, Any]") -> "RunConfig":
        """Return a config as it is, and flat keys as a config."""
        return given if isinstance(given, RunConfig) else cls.from_dict(given)

    def to_dict(self) -> dict[str, Any]:
        """Return all keys and values, in the order of their declaration."""
        return dataclasses.asdict(self)

    def replace(self, /, **changes: Any) -> Self:
        """Return a copy with `changes` applied, validated like any other config."""
        return self.from_dict(self.to_dict() | changes)

    @classmethod
    def from_yaml(cls, /, *files: str | Path, **changes: Any) -> Self:
        """Build a config from YAML files. Later files override earlier ones, and `changes` override all files."""
        values: dict[str, Any] = {}
        for path in files:
            loaded = read_yaml(path, "config")
            # A scale file holds the keys of a run under `base`, next to keys that only notebooks read.
            below = isinstance(loaded, dict) and "base" in loaded
            keys = loaded["base"] if below else loaded
            if not isinstance(keys, dict):
                raise ConfigError(f"config {str(path)!r} must hold `key: value` lines{' below base' * below}, "
                                  f"but holds {'nothing' if keys is None else type(keys).__name__}")  # fmt: skip
            beside = [field.name for field in dataclasses.fields(cls) if below and field.name in loaded]
            if beside:
                raise ConfigError(f"config {str(path)!r}: {beside[0]}={loaded[beside[0]]!r} is next to base, where no run "
                                  f"reads it: move it below base")  # fmt: skip
            values |= keys
        return cls.from_dict(values | changes)

    def identity(self) -> dict[str, Any]:
        """Return the keys that determine what is computed: two configs with equal identities are the same run."""
        unread = {name for row in ROUTERS.values() for name in row.keys} - set(self.row.keys)
        unread |= _TEXT_KEYS if self.images else _IMAGE_KEYS
        if self.max_experts_per_token is None:
            unread.add("cap_solver")
        keep = {k: v for k, v in self.to_dict().items() if k not in unread | _NOT_IDENTITY}
        if self.ranks == 1 and keep.get("pool") == "rank":
            keep["pool"] = "batch"
        return keep | {"data": bare_data(self.data)}

    def digest(self) -> str:
        """Return 12 hex digits of the SHA-256 of the identity and the schema version."""
        return check_sum({"schema": SCHEMA} | self.identity())[:12]

    @property
    def name(self) -> str:
        """`slug-digest`, which names the run's folder and its record."""
        return f"{self.slug()}-{self.digest()}"

    def slug(self) -> str:
        """Return the readable part of the run's name: router, its main settings, seed."""
        words = [self.router.replace("_", "-")]
        if "top_k" in self.row.keys:
            words.append(f"top{self.top_k}")
        if "capacity_factor" in self.row.keys:
            words.append("c" + ("none" if self.capacity_factor is None else f"{self.capacity_factor:g}"))
        return "-".join([*words, f"s{self.seed}"])


ROUTER_KEYS = {"d_model", *(name for row in ROUTERS.values() for name in row.keys)}
CHOICES = {field.name: field.metadata["choices"] for field in dataclasses.fields(RunConfig)}
_BOUNDS = {"low": (ge, "at least"), "high": (le, "at most"), "above": (gt, "above"), "below": (lt, "below")}


def _of_images(data: str) -> bool:
    return data in IMAGES or data.startswith(IMAGES_PREFIX)


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value if it is valid for its key, else raise a ConfigError. Only int to float is converted."""
    meta, allowed = field.metadata, typing.get_args(field.type) or (field.type,)
    if type(value) is int and abs(value) > LARGEST:
        shown = value if value.bit_length() < 10_000 else f"2**{value.bit_length() - 1}"  # Python prints no more digits
        raise ConfigError(f"{field.name}={shown} is too large: must be at most {LARGEST}")
    if float in allowed and type(value) is int:
        value = float(value)
    if isinstance(value, str) and len(value) > 4000:  # such as a text in place of its path
        raise ConfigError(f"{field.name}={value[:40]!r}...: has {len(value)} characters; at most 4000 are allowed")
    if isinstance(value, str) and not value.isascii() and value != value.encode(errors="ignore").decode():
        raise ConfigError(f"{field.name}={ascii(value)}: is not valid UTF-8: rename the file, or leave it out")
    if type(value) not in allowed:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
        right = f"must be {names}{_remedy(value, allowed)}"
        raise ConfigError(f"{field.name}={value!r} is of type {type(value).__name__}, but {right}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name}={value!r}: must be a finite number")
    if meta["choices"] and isinstance(value, str) and value not in meta["choices"]:
        words = ", ".join(meta["choices"]) + ", or a whole number" * (int in allowed)
        raise ConfigError(f"{field.name}={value!r}: must be one of {words}")
    if type(value) in (int, float):
        for bound, (holds, words) in _BOUNDS.items():
            if meta[bound] is not None and not holds(value, meta[bound]):
                raise ConfigError(f"{field.name}={value!r}: must be {words} {meta[bound]:g}")
    return value


def check_key(name: str, value: Any) -> Any:
    """Return the value; raise a ConfigError if RunConfig's key can't have it. numpy's numbers count as Python's."""
    value = value.item() if hasattr(value, "item") else value
    return _checked(RunConfig.__dataclass_fields__[name], value)


def _remedy(value: Any, allowed: tuple[Any, ...]) -> str:
    """Return a hint on how to write a number of the wrong type (YAML reads `1e-3` as text), or an empty string."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return ""
    if float in allowed and math.isfinite(number):
        mantissa, exponent = f"{number:.12e}".split("e")
        return f": write {float(mantissa)}e{int(exponent):+d} (YAML reads {value} as text)"
    if int in allowed and number.is_integer():
        return f": write {int(number)}" + ", without quotes" * isinstance(value, str)
    return ""
