"""Each scale's models are as large, and its runs as long, as comments and pages say, and as a scale is for."""

import pytest
import yaml

from ecmoe import paths
from ecmoe.continual import ContinualConfig
from ecmoe.study import plan
from tests.configs.rows import CENTRE, SCALES, arms, scale_of

PICTURES = {"digits": (8, 1, 10), "images:data/cifar10": (32, 3, 10), "images:data/imagenet": (224, 3, 1000)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("page", ["10_vision", "11_continual_learning"])
def test_a_network_sees_whole_pictures(page, scale):
    for config in (one.config for one in plan.plan(scale, [page])):
        side, channels, classes = PICTURES[config.data.partition("#")[0]]
        assert config.sequence_length == (side // config.patch_size) ** 2 and side % config.patch_size == 0
        assert (config.channels, config.classes) == (channels, classes)


def test_runs_are_as_long_as_their_configs_say():
    """Numbers that comments and pages give in words: tokens, passes over a data set, shares of another run."""
    run = {page: plan.plan("gpu", [page])[0].config for page in plan.pages("gpu") if plan.plan("gpu", [page])}
    study, large, rates = run["01_convergence"], run["07_fine_tuning"], run["14_learning_rate"]
    assert study.tokens_per_batch == 16_384 and round(study.steps * study.tokens_per_batch, -6) == 52e6
    assert large.tokens_per_batch == 32_768 and round(large.steps * large.tokens_per_batch, -5) == 105.2e6
    assert (4 * rates.steps, 4 * rates.warmup_steps) == (study.steps, study.warmup_steps)
    vision, tasks = run["10_vision"], run["11_continual_learning"]
    assert vision.steps * vision.batch_size == 30 * 50_000 and vision.eval_batches * vision.batch_size == 10_000
    assert tasks.steps * tasks.batch_size == 25 * 50_000 / tasks.tasks  # a fifth of the images each
    assert all(config.steps % config.eval_every == 0 for config in run.values() if config is not tasks)


def test_scale_smoke_takes_minutes_on_two_cores():
    """So many FLOPs, in models so small that their memory is nothing; from data that every machine has."""
    from ecmoe.model.build import count_parameters, flops_per_token

    planned = plan.plan("smoke")
    assert {one.config.data for one in planned} == {"stdlib", "digits"}
    runs = [one.config for one in planned if not isinstance(one.config, ContinualConfig)]  # these take seconds in all
    cost = sum(config.steps * config.tokens_per_batch * flops_per_token(config) for config in runs)
    assert 5e12 < cost < 9e12
    study, vision = arms("01_convergence", "smoke")[CENTRE], next(iter(arms("10_vision", "smoke").values()))
    assert 1.5e5 < count_parameters(study).total < 2.5e5 and 1.5e5 < count_parameters(vision).total < 5e5
    assert study.tokenizer == "bytes" and study.vocab_size == 256 and study.moe_every == 2 and vision.moe_every == 1
    assert study.steps * study.tokens_per_batch < study.max_bytes / 2  # no text is read twice
    for config in (study, vision):
        assert config.d_model == 16 * config.heads and config.layers == 2 and config.d_ff == 2 * config.d_model
        assert config.steps % config.eval_every == 0 and config.warmup_steps <= config.steps / 8
    assert study.steps >= 4 * study.eval_every and vision.steps == 2 * vision.eval_every
    tasks = arms("11_continual_learning", "smoke")["Expert Gate"]
    assert tasks.steps * tasks.batch_size <= 5000 and tasks.gate_steps * tasks.batch_size <= 15_000
    assert tasks.learning_rate == vision.learning_rate == study.learning_rate


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_networks_that_learn_in_sequence_have_an_expert_for_each_task(scale):
    shown = arms("11_continual_learning", scale)
    for config in shown.values():
        assert config.num_experts == config.tasks == config.classes / 2 and config.threshold == 0.85  # the paper's
        assert config.capacity_factor == arms("01_convergence", scale)[CENTRE].capacity_factor and config.moe_every == 1
        assert config.d_model >= 8 * config.heads
    assert {config.approach for config in shown.values()} == {"expert_gate", "sequence", "joint"}


def test_scale_gpu_has_the_settings_that_no_runs_name_keeps():
    """The others are part of the names of its committed runs, so that a page whose sizes change misses them."""
    vision = yaml.safe_load((paths.configs() / "scale/gpu/10_vision.yaml").read_text())["base"]
    assert {"eval_every": 250, "checkpoint_every": 1000}.items() <= vision.items()
    fast = {"compile": True, "cuda_graph": True, "checkpoint_every": 3200}
    assert fast.items() <= scale_of("gpu")["base"].items()


def test_scale_paper_has_the_papers_size_and_glams_settings():
    from ecmoe.model.build import TABLE_1

    base, preset = scale_of("paper")["base"], TABLE_1["0.1B/64E"].config
    sizes = (
        "layers", "d_model", "d_ff", "heads", "num_experts", "sequence_length", "batch_size", "vocab_size", "data",
        "tokenizer", "streaming",
    )  # fmt: skip
    assert {key: base[key] for key in sizes} == {key: getattr(preset, key) for key in sizes}
    assert base["batch_size"] * base["sequence_length"] * base["accumulate"] == 2**20  # a million tokens a step
    glam = {
        "optimizer": "adafactor",
        "learning_rate": 0.01,
        "gradient_clip": 1.0,
        "schedule": "inverse_sqrt",
        "constant_steps": 10_000,
    }
    assert {key: base[key] for key in glam} == glam and scale_of("paper")["train_missing"] is False
    ours = {"steps": 100_000, "warmup_steps": 0, "activation_checkpointing": True, "eval_every": 1000}
    assert base == {key: base[key] for key in sizes} | glam | ours | {"accumulate": 16, "checkpoint_every": 1000}
    assert scale_of("paper")["scale"] == "paper" and scale_of("paper")["seeds"] == [0]
    overlays = {
        path.stem: yaml.safe_load(path.read_text()) for path in (paths.configs() / "scale/paper").glob("*.yaml")
    }
    vision = {  # V-MoE-B/16, with as many images a step as it has (4,096), but for whole numbers of places
        "data": "images:data/imagenet", "augment": True, "patch_size": 16, "channels": 3, "classes": 1000,
        "sequence_length": 196, "num_experts": 32, "batch_size": 800, "accumulate": 5, "optimizer": "adamw",
        "learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "linear", "decay_fraction": 1.0, "warmup_steps": 10_000,
    }  # fmt: skip
    assert overlays["10_vision"]["base"] == vision and "base" not in overlays["09_causality"]
    large = {key: getattr(plan.plan("gpu", ["07_fine_tuning"])[0].config, key) for key in sizes[:6]}
    assert large == {key: base[key] for key in large}
