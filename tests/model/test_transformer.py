"""The Transformer: causal where it must be, its bias and FFN as written out, sizes as printed in Table 1."""

import hashlib
import math
import re
import struct

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ecmoe.config import ROUTERS, ConfigError, RunConfig
from ecmoe.model import moe, transformer
from ecmoe.model.build import TABLE_1, build_model, count_parameters, flops_per_token
from ecmoe.routing import build_router

SMALL = RunConfig(layers=2, d_model=16, d_ff=24, heads=2, sequence_length=12, batch_size=2, num_experts=4)


def ids(T=12, B=2, seed=0):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(seed))


def test_experts_are_in_every_other_layer_and_nowhere_in_the_dense_twin():
    model = build_model(SMALL.replace(layers=4))
    assert [block.moe is not None for block in model.blocks] == [False, True, False, True]
    assert [block.ffn is not None for block in model.blocks] == [True, False, True, False]
    assert build_model(SMALL.replace(router="dense")).moe_layers == []
    for every, layers in ((1, [0, 1, 2, 3, 4, 5]), (3, [2, 5]), (4, [3])):
        blocks = build_model(SMALL.replace(layers=6, moe_every=every)).blocks
        assert [i for i, block in enumerate(blocks) if block.moe is not None] == layers


def test_experts_take_the_kernels_of_the_config():
    model = build_model(SMALL.replace(kernels="triton-bmm"))
    assert [layer.kernels for layer in model.moe_layers] == ["triton-bmm"]


@pytest.mark.parametrize("router", ["dense", "hash"])
def test_no_logit_sees_a_later_token(router):
    model = build_model(SMALL.replace(router=router, capacity_factor=None)).double().eval()
    a, b = ids(), ids(seed=1)
    b[:, :7] = a[:, :7]
    assert torch.allclose(model(a)[:, :7], model(b)[:, :7], atol=1e-12)
    assert not torch.allclose(model(a)[:, 7:], model(b)[:, 7:], atol=1e-3)


def test_gated_ffn_is_gelu_gated():
    ffn = build_model(SMALL).blocks[0].ffn
    x = torch.randn(3, 16)
    gate = F.gelu(x @ ffn.gate_up.weight.T, approximate="tanh")
    torch.testing.assert_close(ffn(x), (gate * (x @ ffn.value_up.weight.T)) @ ffn.down.weight.T)


def test_each_block_adds_to_the_stream_and_the_norm_comes_last():
    model, tokens = build_model(SMALL.replace(layers=3)).double(), ids()
    x = model.embedding.weight[tokens]

    def norm(x):  # its weight is 1 at the start
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    for block in model.blocks:
        x = x + block.attention(norm(x))
        x = x + (block.ffn or block.moe)(norm(x))
    torch.testing.assert_close(model.hidden(tokens), norm(x))
    torch.testing.assert_close(model(tokens), norm(x) @ model.embedding.weight.T)


def test_initial_values_keep_the_stream_near_1():
    """Fan-in; what adds to the residual stream is scaled by (2 L)^-1/2, and experts by moe_init_scale besides."""
    d, f, scale = 48, 96, 4.0  # no default
    model = build_model(RunConfig(layers=2, d_model=d, d_ff=f, moe_init_scale=scale, relative_init="normal"))
    expected = {
        "embedding.weight": d**-0.5, "blocks.0.attention.qkv.weight": d**-0.5, "blocks.1.attention.out.weight": (4 * d) ** -0.5,
        "blocks.0.attention.relative.weight": 0.1, "blocks.0.ffn.gate_up.weight": d**-0.5,
        "blocks.0.ffn.value_up.weight": d**-0.5, "blocks.0.ffn.down.weight": (4 * f) ** -0.5, "blocks.1.moe.w1": d**-0.5,
        "blocks.1.moe.w2": scale * (4 * f) ** -0.5, "blocks.1.moe.router.weight": d**-0.5,
    }  # fmt: skip
    named = dict(model.named_parameters())
    for name, std in expected.items():
        assert named[name].std().item() == pytest.approx(std, rel=0.12), name
    assert all((p == 1).all() for name, p in named.items() if name.endswith("norm.weight"))


def test_values_follow_from_seed_and_name_for_ever():
    """Another way to draw them would make other runs of the same configs."""
    named = dict(build_model(SMALL.replace(seed=7)).named_parameters())
    for name, std in (("embedding.weight", 16**-0.5), ("blocks.1.moe.router.weight", 16**-0.5)):
        (seed,) = struct.unpack_from("<Q", hashlib.sha256(f"7/{name}".encode()).digest())
        drawn = torch.randn(named[name].shape, generator=torch.Generator().manual_seed(seed // 2))
        torch.testing.assert_close(named[name].detach(), drawn * std)


def test_whatever_was_learned_values_start_anew():
    model = build_model(SMALL)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    model.initialize(SMALL.seed)
    expected = build_model(SMALL).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_experts_are_told_what_is_known_of_the_tokens(monkeypatch):
    told, model = [], build_model(SMALL)
    monkeypatch.setattr(moe.MoE, "forward", lambda layer, x, **known: told.append(known) or x)
    known = {"token_ids": ids(), "task_ids": torch.tensor([1, 3]), "mask": torch.arange(12) < torch.tensor([[5], [9]])}
    model(**known, targets=ids(seed=1))
    model(ids())
    (first, second) = told
    assert all(first.pop(name) is value for name, value in known.items()) and not first
    assert torch.equal(second.pop("token_ids"), ids()) and second == {"task_ids": None, "mask": None}


def test_a_balanced_table_is_of_the_corpus_counts():
    config, counts = SMALL.replace(router="hash", hash_table="balanced"), torch.arange(256)
    (layer,) = build_model(config, counts).moe_layers
    assert torch.equal(layer.router.table, build_router(config, counts).table)


def test_a_block_is_compiled_for_each_size(monkeypatch):
    told = []
    monkeypatch.setattr(transformer.Block, "compile", lambda block, **how: told.append((block, how)))
    (model := build_model(SMALL)).compile_blocks()
    assert told == [(block, {"dynamic": False}) for block in model.blocks]
    assert "forward" not in vars(model.moe_layers[0])  # it is compiled with its block


def test_a_model_is_built_of_keys_and_values_too():
    keys = SMALL.to_dict() | {"layers": 4, "seed": 3}
    built, same = build_model(keys), build_model(SMALL.replace(layers=4, seed=3))
    assert built.config == same.config
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in built.state_dict().items())
    with pytest.raises(ConfigError, match="unknown key 'step' with value 2: did you mean steps?"):
        build_model({"step": 2})


def test_same_seed_same_values_in_all_shared_parameters():
    ec = dict(build_model(SMALL).named_parameters())
    for other in (SMALL.replace(router="token_choice"), SMALL.replace(router="dense"), SMALL.replace(gate="scaled")):
        shared = {k: v for k, v in build_model(other).named_parameters() if k in ec and v.shape == ec[k].shape}
        assert len(shared) >= 10
        assert all(torch.equal(v, ec[k]) for k, v in shared.items())
    changed = dict(build_model(SMALL.replace(seed=1)).named_parameters())
    assert not torch.equal(changed["embedding.weight"], ec["embedding.weight"])


def test_initial_loss_is_that_of_a_uniform_guess():
    config = RunConfig(sequence_length=32, batch_size=8)
    model = build_model(config)
    tokens = ids(33, 8)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.7  # logits of variance 1 add a half


def test_activation_checkpointing_changes_nothing(monkeypatch):
    calls = []
    for module in (transformer, moe):
        monkeypatch.setattr(module, "checkpoint", lambda *how, **keys: calls.append(how) or checkpoint(*how, **keys))
    results = []
    for recompute in (False, True):
        model = build_model(SMALL.replace(activation_checkpointing=recompute))
        model(ids()).square().mean().backward()
        assert len(calls) == 4 * recompute  # both attentions, the FFN and the experts
        results.append({k: p.grad for k, p in model.named_parameters()})
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    model.eval()(ids())
    assert len(calls) == 4  # nothing to keep where nobody goes back


def printed(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


@pytest.mark.parametrize("name", ["0.1B/32E", "0.1B/64E", "0.1B/128E", "8B/64E"])
def test_totals_are_those_of_table_1(name):
    preset = TABLE_1[name]
    assert preset.config.heads == (32 if name.startswith("8B") else 12)
    total = count_parameters(preset.config).total
    decimals = len(preset.total[:-1].partition(".")[2])
    assert f"{total / 1e9:.{decimals}f}B" == preset.total


@pytest.mark.parametrize(
    ("name", "total", "off"), [("0.1B", "130M", 0.13), ("0.1B/16E", "548M", 0.05), ("8B", "8.7B", 0.02)]
)
def test_the_other_rows_differ_by_what_the_paper_leaves_open(name, total, off):
    assert TABLE_1[name].total == total
    assert abs(count_parameters(TABLE_1[name].config).total / printed(TABLE_1[name].total) - 1) < off


@pytest.mark.parametrize("router", ROUTERS)
def test_count_equals_the_built_model(router):
    config = SMALL.replace(router=router)
    model = build_model(config)
    total = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    count = count_parameters(config)
    assert count.total == total
    experts = sum(m.w1.numel() + m.w2.numel() for m in model.moe_layers)
    per_token = config.row.experts_per_token(config.to_dict())  # which is true of the router: tests/test_routers.py
    assert count.active == total - experts + experts * per_token // 4
    assert count_parameters(config.replace(hash_table="balanced")) == count  # a table is no parameter
    if router == "kmeans":
        assert count_parameters(config.replace(capacity_factor=None)) == count


@pytest.mark.parametrize("router", ["dense", "expert_choice"])
def test_padding_follows_the_tokens(router):
    model, tokens = build_model(SMALL.replace(router=router)).eval(), ids(8)
    mask = torch.arange(12) < 8
    padded = model(torch.cat([tokens, ids(4, seed=1)], 1), mask=mask.expand(2, 12))
    torch.testing.assert_close(padded[:, :8], model(tokens))
    with pytest.raises(ValueError, match="mask has padding before a token"):
        model(ids(), mask=mask.flip(0).expand(2, 12))
    with pytest.raises(ValueError, match=r"mask has shape \(12, 2\): must be \(2, 12\), as token_ids"):
        model(ids(), mask=mask.expand(2, 12).T)
    with pytest.raises(ValueError, match="mask has padding, and there is a cache"):
        model(ids(), mask=mask.expand(2, 12), cache=[[] for _ in model.blocks])


def test_the_loss_is_of_what_is_no_padding():
    model, tokens, targets = build_model(SMALL.replace(router="dense")).eval(), ids(), ids(seed=1)
    mask = torch.arange(12) < torch.tensor([[8], [5]])
    expected = F.cross_entropy(model(tokens, mask=mask)[mask], targets[mask])
    torch.testing.assert_close(model(tokens, mask=mask, targets=targets), expected)
    torch.testing.assert_close(
        model(tokens, targets=targets), F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    )


@pytest.mark.parametrize("shape", [(12,), (1, 2, 12)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"^token_ids has shape {re.escape(str(shape))}: must be \(B, T\)$"):
        build_model(SMALL)(torch.zeros(shape, dtype=torch.long))


def test_flops_count_the_output_layer_and_attention():
    config = SMALL.replace(router="dense")
    active = count_parameters(config).active
    assert flops_per_token(config) == 6 * (active + 256 * 16) + 6 * 2 * 12 * 16


def test_table_1_is_in_the_papers_order():
    assert " ".join(TABLE_1) == "0.1B 0.1B/16E 0.1B/32E 0.1B/64E 0.1B/128E 8B 8B/64E"


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_has_the_papers_sizes(name):
    config, (size, _, experts) = TABLE_1[name].config, name.partition("/")
    sizes = {"0.1B": (12, 768, 3072, 12), "8B": (32, 4096, 16384, 32)}
    assert (config.layers, config.d_model, config.d_ff, config.heads) == sizes[size]
    assert (config.sequence_length, config.batch_size, config.vocab_size) == (1024, 64, 256_000)
    assert (config.data, config.streaming, config.tokenizer) == ("c4", True, "bpe")
    active = {"0.1B": "145M" if experts else "130M", "8B": "9.8B" if experts else "8.7B"}[size]
    assert TABLE_1[name].active == active and (experts or TABLE_1[name].total == active)
    assert (
        (config.router, f"{config.num_experts}E") == ("expert_choice", experts) if experts else config.router == "dense"
    )
