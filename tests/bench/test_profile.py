"""Where the time of a training step goes: kernels' time by kind of work."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ecmoe.bench import profile as bench_profile
from ecmoe.bench import step as bench_step
from ecmoe.files import write_json


def test_kernels_time_is_told_by_operator_and_what_overlaps_counts_once():
    def event(cat, name, ts, dur, external):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"External id": external}}

    events = [
        event("cpu_op", "aten::bmm", 0, 5, 1),
        event("cpu_op", "aten::mm", 5, 5, 2),
        event("gpu_memset", "Memset (Device)", 4300, 100, 3),
        event("kernel", "nobody's", 4400, 100, 3) | {"args": {}},
        event("kernel", "last", 3900, 200, 3),  # while the long one runs, as the short one before it
        event("kernel", "short", 3100, 100, 3),
        event("kernel", "long", 3000, 1000, 3),
        event("kernel", "nvjet_x", 100, 1000, 1),
        event("kernel", "nvjet_x", 1600, 400, 2),
        event("gpu_memcpy", "Memcpy DtoD", 1900, 300, 3),
        {"ph": "M", "name": "process_name"},
        {"cat": "cpu_op", "name": "cudaLaunchKernel", "args": {}},
        event("gpu_user_annotation", "Optimizer.step", 0, 9000, 4),
    ]
    spent = bench_profile.kernel_time(events)
    by_hand = {"aten::bmm nvjet_x": 1.0, "idle": 0.5 + 0.8 + 0.2, "aten::mm nvjet_x": 0.4, "Memcpy DtoD": 0.2}
    by_hand |= {"nobody's": 0.1, "long": 1.0, "short": 0.0, "last": 0.1, "Memset (Device)": 0.1}
    assert spent == pytest.approx(by_hand) and bench_profile.kernel_time([]) == {}
    most = bench_profile.by_kind({"aten::mm b": 1.0, "aten::mm d": 0.5, "aten::mm c": 3.0, "aten::mm a": 2.0})["most"]
    assert most.tolist() == ["aten::mm c; aten::mm a; aten::mm b"]  # that took most
    (long,) = bench_profile.by_kind({"aten::mm " + 90 * "x": 1.0})["most"]
    assert long == "aten::mm " + 51 * "x"  # 60 letters
    table = bench_profile.by_kind(spent)
    kinds = dict(zip(table["kind"], table["ms"], strict=True))
    assert list(kinds) == ["idle", "norms and other passes", "experts' products", "other products", "copies and casts"]
    assert list(kinds.values()) == pytest.approx([1.5, 1.2, 1.0, 0.4, 0.3])
    assert table["share"].sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_fastest_path_is_profiled_on_its_device(kind, monkeypatch):
    """A stand-in for torch.profiler: what it would say on each device of three steps."""
    slow, fast = bench_step.Row("EC-CF2", "own", "plain"), bench_step.Row("EC-CF2", "own", "triton", "compiled")
    asked, made = [], []

    class Profile:
        def __init__(self, activities):
            asked.append([activity.name for activity in activities])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return [
                SimpleNamespace(key="aten::bmm", self_cpu_time_total=6000.0),
                SimpleNamespace(key="other", self_cpu_time_total=3000.0),
            ]

        def export_chrome_trace(self, name):
            events = [
                {"cat": "kernel", "name": "bmm", "ts": 0, "dur": 6000},
                {"cat": "kernel", "name": "x", "ts": 6000, "dur": 3000},
            ]
            write_json(Path(name), {"traceEvents": events})

    def steps(configs, device, **keys):
        asked.append((list(configs), device.type, keys))
        graph = fast._replace(mode="compiled, CUDA graph")
        thread = torch._C._is_multithreading_enabled  # whether backward passes run in another one than in training
        return {row: lambda row=row: made.append((row, thread())) for row in (slow, fast, graph)}

    times = {slow: [0.5, 0.2, 0.9], fast: [0.6, 0.3, 0.4]}

    def timed(calls, repeats):
        asked.append(repeats)
        return SimpleNamespace(times={row: times[row] for row in calls}, absent=["y"])

    monkeypatch.setattr(bench_profile.timing, "timed", timed)
    monkeypatch.setattr(bench_profile.timing, "this_device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("wait"))
    for name, value in {
        "arms": lambda sizes: {"EC-CF2": sizes, "other": 0},
        "profile": Profile,
        "steps": steps,
    }.items():
        monkeypatch.setattr(bench_profile, name, value)
    monkeypatch.setattr(bench_profile, "setting", lambda sizes: {"of": sizes})
    table = bench_profile.bench_profile(n=4, **{"compiled": True} if kind == "cuda" else {})
    assert asked == [
        (["EC-CF2"], kind, {"compiled": kind == "cuda"}),
        3,
        ["CPU"] + ["CUDA"] * (kind == "cuda"),
    ]
    assert made == [(fast, False)] * 3 + ["wait"] * (kind == "cuda")  # by its median
    kinds = [("experts' products", 2.0, pytest.approx(2 / 3)), ("norms and other passes", 1.0, pytest.approx(1 / 3))]
    rows = [(row["kind"], row["ms"], row["share"]) for row in table.to_dict("records") if row["kind"] != "idle"]
    assert rows == kinds and table.attrs["step_ms"] == 400.0 and table.attrs["absent"] == ["y"]
    assert {"of": {"n": 4}, "arm": "EC-CF2", "path": "EC-CF2, triton, compiled", "steps": 3}.items() <= table.attrs[
        "setting"
    ].items()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("_product_kernel", "experts' products"),
        ("aten::_grouped_mm cutlass_gemm_grouped", "experts' products"),
        ("aten::mm nvjet_tst_128x256", "other products"),
        ("_flash_queries_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention flash_fwd_kernel", "attention"),
        ("_losses_kernel", "loss"),
        ("_scaled_kernel", "loss"),
        ("_squares_kernel", "optimiser"),
        ("aten::_fused_adamw_ void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimiser"),
        ("aten::linalg_vector_norm void at::native::reduce_kernel<NormTwoOps>", "optimiser"),
        ("_logits_dw_kernel", "routing"),
        ("_sum_kernel", "routing"),
        ("aten::linear my_kernel", "other products"),
        ("Memcpy DtoD", "copies and casts"),
        ("_take_kernel", "routing"),
        ("_gather_dot_kernel", "gather and combine"),
        ("_combine_kernel", "gather and combine"),
        ("_activate_kernel", "activation"),
        ("triton_poi_fused_gelu_mul_3", "activation"),
        ("triton_per_fused__to_copy_add_rms_norm_1", "norms and other passes"),
        ("aten::copy_ void at::native::elementwise_kernel<direct_copy>", "copies and casts"),
        ("Memset (Device)", "copies and casts"),
        ("something else", "norms and other passes"),
    ],
)
def test_kinds_of_work(name, kind):
    assert bench_profile.kind_of(name) == kind


OPERATORS = {  # names in which nothing but one word tells the kind of work
    "experts' products": ["aten::bmm x"],
    "attention": ["aten::_efficient_attention_forward fmha_cutlassF_f32_aligned", "aten::scaled_dot_product_attention x"],
    "loss": ["aten::_log_softmax x", "aten::logsumexp x", "aten::nll_loss_forward x"],
    "other products": ["nvjet_sm90_tst_192x192", "sm80_xmma_fprop", "ampere_s16816gemm_bf16", "void cutlass::Kernel2", "cublasLt::splitK",
                       "aten::mm x", "aten::addmm x", "aten::matmul x"],
    "optimiser": ["aten::_fused_adamw_ x", "void at::native::multi_tensor_apply_kernel", "aten::_foreach_mul_ x", "clip_grad_norm_",
                  "aten::norm void lpnorm_cuda_kernel"],
    "routing": ["ecmoe::logits x", "ecmoe::select x", "aten::topk x", "aten::sort x", "aten::searchsorted x", "void cub::DeviceRadixHistogram"],
    "gather and combine": ["aten::gather x", "aten::scatter_ x", "aten::index_add_ x"],
    "copies and casts": ["void at::native::direct_copy_kernel_cuda", "aten::copy_ x", "aten::_to_copy x", "aten::to x", "aten::cat x",
                         "aten::fill_ x", "aten::zero_ x"],
    "norms and other passes": ["aten::mul x", "aten::mms x"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), OPERATORS.items(), ids=OPERATORS)
def test_operators_of_pytorch_have_their_kind(kind, names):
    assert {name: bench_profile.kind_of(name) for name in names} == dict.fromkeys(names, kind)
