"""RunConfig: what it refuses, and what makes two runs the same."""

import dataclasses
import hashlib
import json
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ecmoe.config import CHOICES, ConfigError, RunConfig
from ecmoe.continual import ContinualConfig
from ecmoe.routers import ROUTERS, bucket_size


def test_bucket_size_is_equation_1():
    assert bucket_size(2048, 8, 2.0) == 512  # 2048 x 2 / 8
    assert bucket_size(2048, 8, 0.5) == 128
    assert bucket_size(100, 4, 0.04) == 1  # exact, where floats give 1.0000000000000002 or so
    assert bucket_size(12, 4, 4 / 3) == 4  # though 4/3 is no float
    assert bucket_size(20_000, 2, 1.0001) == 10_001
    assert bucket_size(1_000_000, 1, 1e-6) == 1  # of millionths none is rounded


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 8))
def test_bucket_size_holds_k_experts_times_e_is_n_times_c(groups, e, c):
    n = groups * e
    if c <= e:
        assert bucket_size(n, e, c) * e == n * c


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"nun_experts": 3}, ["nun_experts", "3", "did you mean num_experts"]),
        ({"lr": 0.1}, ["'lr'", "did you mean learning_rate"]),
        ({"factor": 2.0}, ["'factor'", "did you mean capacity_factor"]),
        ({"batch": 3}, ["'batch'", "did you mean"]),
        ({"zzz": 3}, ["'zzz'", "`ecmoe keys` lists the keys"]),
        ({"d_model": 1_000_000_000_001}, ["heads=4: must divide d_model=1000000000001"]),
        ({"heads": 10**15 + 1}, ["heads=1000000000000001: must divide d_model=64"]),
        ({"capacity_factor": 1e308}, ["capacity_factor=1e+308", "(num_experts)"]),
        ({"capacity_factor": 5e-324}, ["capacity_factor=5e-324", "(num_experts)"]),
        ({"learning_rate": float("inf")}, ["learning_rate", "finite"]),
        ({"threshold_beta": 1.0}, ["threshold_beta", "below 1"]),
        ({"layers": 10**9}, ["layers=1000000000", "at most 10000"]),
        ({"relative_max_distance": 10**15}, ["relative_max_distance", "at most 1e+06"]),
        ({"learning_rate": "1e-3"}, ["learning_rate", "'1e-3'", "write 1.0e-3"]),
        ({"learning_rate": "3e5"}, ["write 3.0e+5"]),  # without the sign it is text to YAML
        ({"capacity_factor": 0.0, "router": "dense"}, ["capacity_factor=0.0", "above 0"]),
        ({"learning_rate": 1e38}, ["learning_rate=1e+38", "at most 1e+30"]),
        ({"router": "token_choice", "top_k": 5, "num_experts": 4}, ["top_k=5", "num_experts=4"]),
        ({"learning_rate": "nan"}, ["learning_rate", "'nan'", "float"]),
        ({"steps": 10.0}, ["steps", "10.0", "write 10"]),
        ({"steps": "10"}, ["steps", "'10'", "write 10"]),
        ({"seed": True}, ["seed", "True", "int"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"beta1": 1.5}, ["beta1", "below 1"]),
        ({"beta2": 1}, ["beta2=1.0", "below 1"]),
        ({"decay_fraction": 1.5}, ["decay_fraction", "at most 1"]),
        ({"seed": 10**23}, ["seed=100000000000000000000000", "at most 9223372036854775807"]),
        ({"learning_rate": 10**400}, ["learning_rate=1000", "at most 9223372036854775807"]),
        ({"learning_rate": -(10**400)}, ["learning_rate=-1000", "is too large"]),
        (
            {"steps": 2**20_000},
            ["steps=2**20000 is too large", "at most 9223372036854775807"],
        ),  # more digits than Python prints
        ({"gate": "raw"}, ["gate='raw': must be one of softmax, renormalized, scaled"]),
        ({"data": "a" * 4001}, ["data='aaaa", "has 4001 characters; at most 4000"]),
        ({"data": "/"}, ["data='/'", "file or folder name"]),
        ({"data": "b\udcfcch.txt"}, ["data='b\\udcfcch.txt'", "not valid UTF-8", "rename"]),  # a file's name in Latin-1
        ({"data": "images:./"}, ["data='images:./'", "images:PATH"]),
        ({"router": "experts"}, ["router", "expert_choice"]),
        ({"heads": 3}, ["heads=3: must divide d_model=64"]),
        ({"moe_every": 5}, ["moe_every=5 with layers=4: no layer would have experts"]),
        ({"capacity_factor": 0.3}, ["capacity_factor=0.3", "num_experts=8", "76.8", "multiple of 80"]),
        ({"capacity_factor": 16.0}, ["capacity_factor=16", "k=4096", "n=2048", "rounding='down'"]),
        ({"capacity_factor": 1e6}, ["capacity_factor=1000000", "k=2.56e+08"]),
        ({"capacity_factor": None}, ["capacity_factor=null: must be a number, such as 2.0"]),
        ({"router": "expert_threshold", "capacity_factor": None}, ["capacity_factor=null: must be a number"]),
        ({"pool": "document"}, ["pool='document': must be one of batch, rank, sequence, position, or a whole number"]),
        ({"pool": 0}, ["pool=0", "at least 1"]),
        ({"pool": -128}, ["pool=-128", "at least 1"]),
        ({"pool": 200}, ["pool=200", "sequence_length=128"]),
        ({"max_experts_per_token": 1}, ["max_experts_per_token=1", "at least 2"]),
        ({"router": "token_choice", "top_k": 9}, ["top_k=9", "num_experts=8"]),
        ({"vocab_size": 300}, ["vocab_size=300", "bytes"]),
        ({"vocab_size": 256, "tokenizer": "bpe"}, ["vocab_size=256 with tokenizer=bpe", "at least 257"]),
        ({"kernels": "cuda"}, ["kernels='cuda'", "auto, plain, triton, triton-bmm, cute"]),
        ({"router": "linear_assignment", "num_experts": 7}, ["num_experts=7", "2048"]),
        (
            {"data": "images:x", "router": "hash", "hash_table": "balanced"},
            ["routes by token ids and token counts, which"],
        ),
        # Held to the config's own sizes, not to those of the defaults.
        (
            {"router": "linear_assignment", "batch_size": 3, "sequence_length": 5, "accumulate": 8},
            ["num_experts=8", "n=15"],
        ),
        ({"num_experts": 7}, ["capacity_factor=2.0", "num_experts=7", "n=2048", "multiple of 7"]),
        ({"pool": "sequence", "sequence_length": 18}, ["num_experts=8", "4.5", "n=18"]),
        (
            {"router": "expert_threshold", "batch_size": 3, "sequence_length": 6, "pool": 6},
            ["num_experts=8", "4.5", "n=18"],
        ),
        ({"capacity_factor": 4.0, "max_experts_per_token": 3}, ["max_experts_per_token=3", "at least 4"]),
    ],
)
def test_error_names_key_value_and_remedy(values, named):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(values)
    for text in named:
        assert text in str(error.value)


def test_routers_that_take_images_are_named_where_another_is_refused():
    taken, refused = [], {}
    for router in ROUTERS:
        try:
            taken.append(RunConfig(data="digits", router=router).router)
        except ConfigError as error:
            refused[router] = str(error)
    assert all(said.endswith(f", which images don't have; use one of {', '.join(taken)}") for said in refused.values())
    assert refused["task_level"].startswith("router='task_level' with data='digits': it routes by tasks, which")
    assert "dense" in taken


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"capacity_factor": 1.5, "max_experts_per_token": 1}, "max_experts_per_token", r"use at least (\S+),"),
        ({"capacity_factor": 1.5, "max_experts_per_token": 1}, "capacity_factor", r"at most (\S+)$"),
        ({"capacity_factor": 9.0}, "capacity_factor", r"capacity_factor in (\S+)\.\.(\S+) \(num_experts\)"),
        ({"router": "token_choice", "top_k": 9}, "top_k", r"must lie in (\d+)\.\.(\d+) "),
        ({"vocab_size": 300}, "vocab_size", r"must be (\d+) with bytes"),
        ({"vocab_size": 256, "tokenizer": "bpe"}, "vocab_size", r"at least (\d+) with bpe"),
        ({"learning_rate": "1e-3"}, "learning_rate", r"write (\S+) "),
        ({"learning_rate": "1.23456e-3"}, "learning_rate", r"write (1.23456e-3) "),
        ({"steps": "1e2"}, "steps", r"write (\S+),"),
        ({"steps": 10.0}, "steps", r"write (\S+)$"),
    ],
)
def test_who_does_as_an_error_says_is_through(values, key, said):
    with pytest.raises(ConfigError, match=said) as error:
        RunConfig.from_dict(values)
    for remedy in re.search(said, str(error.value)).groups():
        given = {**values, key: yaml.safe_load(remedy)}
        assert RunConfig.from_dict(given).to_dict()[key] == given[key]


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "ten"])
def test_a_text_that_is_no_number_has_no_remedy(text):
    for key in ("steps", "learning_rate"):
        with pytest.raises(ConfigError, match=rf"{key}='{text}' is of type str, but must be (int|float)$"):
            RunConfig.from_dict({key: text})


# What a key may be, at the least or the most; a float stops short of a bound that is out of reach.
BOUNDS = [
    ("at least", 0, "aux_loss_weight z_loss_weight threshold_beta moe_init_scale max_bytes seed learning_rate beta1 beta2 "
                    "weight_decay gradient_clip warmup_steps decay_fraction"),
    ("at least", 1, "num_experts top_k pool max_experts_per_token num_tasks layers d_model d_ff heads moe_every sequence_length "
                    "patch_size channels batch_size accumulate steps constant_steps eval_every eval_batches checkpoint_every "
                    "devices num_nodes code gate_steps"),
    ("at least", 2, "relative_buckets relative_max_distance vocab_size classes tasks held_out"),
    ("above", 0, "capacity_factor gate_learning_rate"),
    ("below", 1, "threshold_beta beta1 beta2"),
    ("at most", 1, "decay_fraction"), ("at most", 1024, "devices"), ("at most", 10_000, "layers"),
    ("at most", 65_536, "num_nodes"), ("at most", 1_000_000, "relative_buckets relative_max_distance"),
    ("at most", 1e6, "weight_decay"), ("at most", 2**24, "sequence_length"), ("at most", 1e30, "learning_rate gate_learning_rate"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "bound", "keys"), BOUNDS)
def test_a_key_reaches_its_bound_and_no_further(words, bound, keys):
    fields = {field.name: field for field in dataclasses.fields(ContinualConfig)}

    def refused(name, value) -> bool:
        kind = RunConfig if name in RunConfig().to_dict() else ContinualConfig
        try:
            kind.from_dict({name: value})
        except ConfigError as error:
            return f"{name}={value!r}: must be {words} {bound:g}" in str(error)
        return False

    out = -1 if words in ("at least", "above") else 1
    for name in keys.split():
        real = "float" in str(fields[name].type)
        at = float(bound) if real else bound
        beyond, inside = (math.nextafter(at, way * math.inf) if real else at + way for way in (out, -out))
        refused_first, taken_last = (at, inside) if words in ("above", "below") else (beyond, at)
        assert refused(name, refused_first) and not refused(name, taken_last), name
    of_words = {"at least": "low", "above": "above", "below": "below", "at most": "high"}[words]
    named = {name for said, _, names in BOUNDS if said == words for name in names.split()}
    assert named == {name for name, field in fields.items() if field.metadata[of_words] is not None}


def test_a_key_of_words_takes_these_and_names_them_in_this_order():
    taken = {
        "gate": "softmax renormalized scaled", "pool": "batch rank sequence position", "cap_solver": "feasible dykstra",
        "priority": "order score", "balance": "switch first_choice importance_load bias none", "hash_table": "modulo balanced",
        "task_table": "learned fixed", "relative_init": "alibi normal", "tokenizer": "bytes bpe", "optimizer": "adamw adafactor",
        "schedule": "constant inverse_sqrt linear", "precision": "auto 32-true bf16-mixed bf16-true 16-mixed 64-true",
        "kernels": "auto plain triton triton-bmm cute", "strategy": "auto ddp fsdp2 ep",
    }  # fmt: skip
    assert {key: " ".join(words) for key, words in CHOICES.items() if words and key != "router"} == taken
    routers = "expert_choice token_choice hash dense_moe dense linear_assignment kmeans task_level expert_threshold"
    assert list(CHOICES["router"]) == list(ROUTERS)
    assert [router for router in ROUTERS if router in routers.split()] == routers.split()  # and further ones
    (approach,) = (field for field in dataclasses.fields(ContinualConfig) if field.name == "approach")
    assert approach.metadata["choices"] == ("expert_gate", "sequence", "joint")


def test_a_default_that_changes_changes_what_others_have_run():
    given = {
        "router": "expert_choice", "num_experts": 8, "capacity_factor": 2.0, "top_k": 2, "gate": "softmax", "pool": "batch",
        "max_experts_per_token": None, "cap_solver": "feasible", "priority": "order", "balance": "switch", "aux_loss_weight": 0.01,
        "z_loss_weight": 0.0, "hash_table": "modulo", "num_tasks": 4, "task_table": "learned", "threshold_beta": 0.999,
        "layers": 4, "d_model": 64, "d_ff": 128, "heads": 4, "moe_every": 2, "moe_init_scale": 1.0, "relative_buckets": 32,
        "relative_max_distance": 128, "relative_init": "alibi", "data": "stdlib", "streaming": False, "max_bytes": 0,
        "tokenizer": "bytes", "vocab_size": 256, "sequence_length": 128, "patch_size": 2, "channels": 1, "classes": 10,
        "augment": False, "seed": 0, "batch_size": 16, "accumulate": 1, "steps": 60, "optimizer": "adamw",
        "learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "gradient_clip": 1.0, "schedule": "constant",
        "warmup_steps": 10, "constant_steps": 10_000, "decay_fraction": 0.2, "eval_every": 20, "eval_batches": 8,
        "checkpoint_every": 1000, "precision": "auto", "compile": False, "cuda_graph": False, "kernels": "auto",
        "activation_checkpointing": False, "strategy": "auto", "devices": 1, "num_nodes": 1,
    }  # fmt: skip
    assert RunConfig().to_dict() == given
    given |= {"approach": "sequence", "tasks": 5, "code": 32, "gate_steps": 300, "gate_learning_rate": 0.01}
    assert ContinualConfig(data="digits").to_dict() == given | {"data": "digits", "threshold": 0.85, "held_out": 10}


def test_the_largest_number_is_none_too_large():
    assert RunConfig(seed=2**63 - 1).seed == 2**63 - 1
    assert len(RunConfig(data="a/" * 1999 + "ab").data) == 4000


@pytest.mark.parametrize("steps", [10.5, "10.5"])
def test_no_remedy_would_change_a_number(steps):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict({"steps": steps})
    assert "must be int" in str(error.value) and "write" not in str(error.value)


def test_every_key_has_help_and_a_default():
    for field in dataclasses.fields(RunConfig):
        assert field.default is not dataclasses.MISSING
        assert len(field.metadata["help"]) > 3, field.name


@pytest.mark.parametrize("router", ROUTERS)
def test_round_trip(router, tmp_path):
    config = RunConfig(router=router)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    again = RunConfig.from_yaml(tmp_path / "config.yaml")
    assert again == config and again.name == config.name
    assert config.name.startswith(router.replace("_", "-")) and config.name.endswith(config.digest())


def test_later_files_win_and_changes_win_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("base: {steps: 1, seed: 1}\nscale: smoke\n")
    (tmp_path / "b.yaml").write_text("steps: 2\n")
    config = RunConfig.from_yaml(tmp_path / "a.yaml", tmp_path / "b.yaml", d_ff=32)
    assert (config.steps, config.seed, config.d_ff) == (2, 1, 32)
    changed = RunConfig.from_yaml(tmp_path / "a.yaml", tmp_path / "b.yaml", steps=3, seed=4)
    assert (changed.steps, changed.seed) == (3, 4)


def test_a_key_may_be_called_like_an_argument_of_python_and_is_unknown_all_the_same():
    for make in (RunConfig.from_yaml, RunConfig().replace):
        for key in ("cls", "self"):
            with pytest.raises(ConfigError, match=f"'{key}'"):
                make(**{key: 1})


def test_bad_files_are_named(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "latin.yaml").write_bytes("data: Grüße.txt".encode("latin-1"))
    (tmp_path / "date.yaml").write_text("seed: 2024-13-45\n")
    for name in ("list.yaml", "absent.yaml", "latin.yaml", "date.yaml"):
        with pytest.raises(ConfigError, match=f"^config '{tmp_path}/{name}' "):
            RunConfig.from_yaml(tmp_path / name)
    for base, held in (("", "nothing"), ("3", "int"), ("[1]", "list")):
        (tmp_path / "base.yaml").write_text(f"base: {base}\n")
        with pytest.raises(ConfigError, match=rf"base\.yaml' must hold `key: value` lines below base, .* {held}$"):
            RunConfig.from_yaml(tmp_path / "base.yaml")


def test_keys_that_no_run_would_read_are_named(tmp_path):
    (tmp_path / "scale.yaml").write_text("steps: 7\nbase: {d_model: 32}\n")
    with pytest.raises(ConfigError, match=r"scale\.yaml': steps=7 is next to base, .* move it below base"):
        RunConfig.from_yaml(tmp_path / "scale.yaml")
    (tmp_path / "twice.yaml").write_text("steps: 10\nsteps: 20\n")
    with pytest.raises(ConfigError, match=r"(?s)twice\.yaml'.*key 'steps' occurs twice"):
        RunConfig.from_yaml(tmp_path / "twice.yaml")


def test_a_name_begins_with_what_a_reader_looks_for():
    config = RunConfig(router="token_choice", top_k=1, capacity_factor=None, seed=3)
    assert config.slug() == "token-choice-top1-cnone-s3"
    assert config.replace(capacity_factor=1.25).slug() == "token-choice-top1-c1.25-s3"
    assert RunConfig(router="dense").slug() == "dense-s0" and RunConfig().slug() == "expert-choice-c2-s0"


def test_digest_follows_what_the_run_reads_and_nothing_else():
    config = RunConfig()
    assert config.replace(seed=1).digest() != config.digest()
    assert config.replace(capacity_factor=1.0).digest() != config.digest()
    assert config.replace(top_k=1).digest() == config.digest()  # expert choice has no top_k
    dense = RunConfig(router="dense")
    assert dense.replace(num_experts=4, capacity_factor=4.0).digest() == dense.digest()
    assert config.replace(eval_every=7).digest() == config.digest()
    assert config.replace(kernels="triton").digest() == config.digest()  # the same results within rounding
    here, there = config.replace(data="data/x.txt.xz"), config.replace(data="/elsewhere/x.txt.xz")
    assert here.digest() == there.digest() != config.digest()
    assert config.replace(data="images:pets").digest() != config.replace(data="pets").digest()
    mixes = [config.replace(data=f"mix:{place}a.txt,{place}b.txt").digest() for place in ("", "/elsewhere/")]
    assert mixes[0] == mixes[1] != config.replace(data="mix:b.txt,a.txt").digest()
    for name in ("folder", "x.txt.gz"):  # with or without a slash
        assert config.replace(data=name).digest() == config.replace(data=f"./{name}").digest()


@pytest.mark.parametrize(
    ("keys", "data", "unread"),
    [
        ({"max_experts_per_token": 3}, "stdlib", "patch_size channels classes augment"),
        ({"data": "images:/there/pets/"}, "images:pets", "cap_solver streaming max_bytes tokenizer vocab_size "
         "relative_buckets relative_max_distance relative_init"),
        ({"data": "mix:c4,/there/b.txt"}, "mix:c4,b.txt", "cap_solver patch_size channels classes augment"),
    ],
)  # fmt: skip
def test_an_identity_is_all_keys_but_those_that_change_nothing(keys, data, unread):
    """And a digest is of it: a name is for ever, as runs are found by it."""
    config = RunConfig(seed=3, **keys)
    watched = "eval_every checkpoint_every compile cuda_graph kernels activation_checkpointing"
    others = {key for row in ROUTERS.values() for key in row.keys} - set(config.row.keys)
    kept = {
        key: value for key, value in config.to_dict().items() if key not in [*unread.split(), *watched.split(), *others]
    }
    assert config.identity() == kept | {"data": data}
    written = json.dumps({"schema": 1} | config.identity(), sort_keys=True)
    assert config.digest() == hashlib.sha256(written.encode()).hexdigest()[:12]


def test_a_pool_of_tokens_holds_whole_sequences_and_divides_the_batch():
    assert [RunConfig(pool=tokens).pool_tokens for tokens in (128, 256, 2048)] == [128, 256, 2048]
    for tokens in (384, 4096, 64):
        with pytest.raises(
            ConfigError, match=f"pool={tokens}: must be a multiple of sequence_length=128 and divide the 2048"
        ):
            RunConfig(pool=tokens)


def test_the_least_that_weights_take_is_counted_by_hand():
    keys = {"layers": 3, "d_model": 8, "d_ff": 16, "heads": 2, "num_experts": 5, "capacity_factor": 1.25}
    attention, gated, experts = 4 * 8 * 8, 3 * 8 * 16, 5 * 2 * 8 * 16
    config = RunConfig(data="digits", patch_size=4, channels=3, classes=7, **keys)
    assert config.weights_at_least == 3 * attention + 2 * gated + experts + 8 * (4 * 4 * 3 + 7)
    assert config.replace(router="dense").weights_at_least == 3 * attention + 3 * gated + 8 * (4 * 4 * 3 + 7)
    assert RunConfig(moe_every=1, **keys).weights_at_least == 3 * attention + 3 * experts + 8 * 256


@pytest.mark.parametrize(
    "data",
    [
        "mix:",
        "mix:a.txt",
        "mix:a.txt,",
        "mix:a.txt,a.txt",
        "mix:a.txt,b.txt,a.txt",
        "mix:,a.txt",
        "mix:stdlib,digits",
        "mix:cifar10,a.txt",
        "mix:a.txt,images:b",
    ],
)
def test_a_mix_that_is_not_of_two_texts_or_more(data):
    with pytest.raises(ConfigError, match="data='mix:.*at least two different texts"):
        RunConfig(data=data)


def test_ranks_are_counted_over_all_nodes():
    config = RunConfig(devices=2, num_nodes=3, strategy="ddp", num_experts=6, batch_size=6)
    assert (
        config.ranks == 6 and config.pool_tokens == 6 * 6 * 128 and config.replace(pool="rank").pool_tokens == 6 * 128
    )
    assert config.replace(pool="position").pool_tokens == 36
    assert config.tokens_per_batch == 6 * 6 * 128


def test_on_one_rank_its_pool_is_the_batch():
    assert RunConfig(pool="rank").name == RunConfig().name
    for ranks in ({"devices": 2}, {"num_nodes": 2}):
        assert RunConfig(pool="rank", **ranks).name != RunConfig(**ranks).name


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "ep", "devices": 3}, "num_experts=8.*3 ranks"),
        ({"strategy": "ep", "devices": 2, "num_nodes": 3}, "num_experts=8.*6 ranks"),
        ({"strategy": "ep", "devices": 2, "router": "dense"}, "router='dense'"),
        ({"strategy": "ep", "devices": 2, "optimizer": "adafactor"}, "optimizer='adafactor' with strategy='ep'"),
        ({"strategy": "fsdp2", "optimizer": "adafactor"}, "optimizer='adafactor' with strategy='fsdp2'"),
    ],
)
def test_what_cannot_be_sharded_is_said(keys, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig(**keys)
