"""How kernels are launched, and functions become operators."""

import inspect
import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ecmoe import kernels
from ecmoe.kernels import attention, capped, choice, common, layer, loss, product, routing, rows, selection
from ecmoe.kernels.common import Operator, block, cdiv, described, kernel
from tests.on_gpu import OnGPU


@kernel
def _scaled_kernel(x, out, size, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place, mask=place < size) * factor, mask=place < size)


@pytest.fixture
def launches(monkeypatch):
    """Launches of `_scaled_kernel`: those that Triton looked at, and those that went past it, with their arguments."""
    seen = SimpleNamespace(triton=[], past=[], device=2)
    compiled = SimpleNamespace(run=lambda *args: seen.past.append(args), function="f", packed_metadata="m")
    jit = SimpleNamespace(arg_names=["x", "out", "size", "factor", "BLOCK"])

    class Launched:
        arg_names = jit.arg_names

        def __getitem__(self, grid):
            return lambda *args, **keys: seen.triton.append((grid, args, keys)) or compiled

    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: seen.device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", "stream of {}".format, raising=False)
    monkeypatch.setattr(_scaled_kernel, "jit", Launched())
    monkeypatch.setattr(_scaled_kernel, "known", {})
    return seen


def test_triton_looks_at_a_launch_once(launches):
    x, out = torch.ones(8), torch.empty(8)
    for grid in ((1,), (1,), (2, 3)):
        _scaled_kernel[grid](x, out, 8, 2.0, BLOCK=8, num_warps=4)
    assert len(launches.triton) == 1
    launch = "stream of 2", "f", "m", None, None, None, x.data_ptr(), out.data_ptr(), 8, 2.0, 8
    assert launches.past == [(1, 1, 1, *launch), (2, 3, 1, *launch)]


@pytest.mark.parametrize("other", ["type", "alignment", "number", "constant", "option", "none", "device", "host"])
def test_what_may_need_another_binary_goes_through_triton(launches, other, monkeypatch):
    """So does a tensor on a CPU beside those on a GPU, whose address would be one of the GPU's: Triton refuses it."""
    x = torch.ones(12)
    given = {"type": x.double(), "alignment": x[2:], "host": x.clone()}.get(other, x)  # to 8 bytes
    on_gpu = property(lambda t: other != "host" or t.data_ptr() == x.data_ptr())
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
    last = None if other == "none" else 2.0
    constants = {"BLOCK": 16 if other == "constant" else 8, "num_warps": 8 if other == "option" else 4}
    for _ in range(2):
        launches.device = 2
        _scaled_kernel[1,](x, x, 8, 2.0, BLOCK=8, num_warps=4)
        launches.device = 3 if other == "device" else 2
        _scaled_kernel[1,](given, x, 9 if other == "number" else 8, last, **constants)
    assert len(launches.triton) == len(launches.past) == 2
    assert launches.past[-1][9] == given.data_ptr()


def test_launches_are_not_remembered_without_end(launches, monkeypatch):
    monkeypatch.setattr(common, "REMEMBERED", 3)
    known = []
    for size in range(10):
        _scaled_kernel[1,](torch.ones(8), torch.ones(8), size, 2.0, BLOCK=8)
        known.append(len(_scaled_kernel.known))
    assert known == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]


def test_a_descriptor_is_tritons_and_has_a_binary_by_type_and_block(launches):
    x = torch.arange(32.0).view(2, 4, 4)
    ours, theirs = described(x, [1, 2, 4]), TensorDescriptor(x, x.shape, x.stride(), [1, 2, 4])
    assert ours.base is x and all(
        getattr(ours, name) == value for name, value in vars(theirs).items() if name != "base"
    )
    for base, cut in ((x, [1, 2, 4]), (x + 1, [1, 2, 4]), (x, [1, 4, 2]), (x.double(), [1, 2, 4])):
        _scaled_kernel[1,](described(base, cut), x, 8, 2.0, BLOCK=8)
    assert len(launches.triton) == 3 and len(launches.past) == 1


SMALL, LARGE = (128, 128, 64, 32, 4, 3, 2), (128, 256, 64, 128, 8, 3, 1)  # of product.Tile
SETTINGS = {
    "attention": {
        "BLOCK": 128,
        "FORWARD": {64: (64, 64, 4, 3, 2, 4), 128: (128, 64, 8, 2, 2, 1)},
        "QUERIES": {64: (64, 64, 4, 3, 2, 3), 128: (64, 64, 4, 2, 1, 2)},
        "KEYS": {64: (64, 64, 4, 2, 2, 3), 128: (64, 32, 4, 2, 2, 2)},
    },
    "capped": {
        "SAMPLE": 8192, "SAMPLE_LEAST": 1024, "JITTER_FIRST": 0.2, "JITTER_LAST": 0.005, "DAMPING": 0.7, "MOST_TOKENS": 512,
        "MOST_EXPERTS": 512, "TILE": {"ELEMENTS": 4096, "num_warps": 4}, "SAMPLE_TILE": {"ELEMENTS": 2048, "num_warps": 4},
        "SETTLE": {"BLOCK": 1024, "num_warps": 4}, "SWEEP": {"BLOCK": 4096, "num_warps": 8},
    },
    "choice": {"NUMBERS": 2048},
    "common": {"REMEMBERED": 4096},
    "loss": {"BLOCK": 4096, "WARPS": 8},
    "routing": {
        "LOGITS": {"ROWS": 128, "DEPTH": 64, "num_warps": 8}, "LOGITS_DX": {"ROWS": 64, "COLUMNS": 128, "num_warps": 4},
        "LOGITS_DW": {"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 4}, "TOKENS_PER_SUM": 1024,
        "SUM": {"BLOCK": 256, "AT_ONCE": 8, "num_warps": 4}, "MOST_EXPERTS": 128,
    },
    "rows": {
        "GATHER": {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}, "GATHER_DOT": {"ROWS": 4, "COLUMNS": 1024, "num_warps": 4},
        "COMBINE": {"ROWS": 1, "COLUMNS": 1024, "num_warps": 1},
    },
    "selection": {
        "SEARCH": {"BLOCK": 4096, "num_warps": 8}, "GUESS": {"BLOCK": 4096, "num_warps": 8},
        "CHUNK": {"BLOCK": 1024, "num_warps": 2}, "SAMPLE": 4096, "DEVIATIONS": 6, "SLACK": 8, "LONGEST": 1 << 21,
    },
}  # fmt: skip


@pytest.mark.parametrize("part", SETTINGS)
def test_settings_are_the_fastest_of_those_that_were_measured(part):
    """On an H200. Others are slower, or add in another order, and so give other bits."""
    module = import_module(f"ecmoe.kernels.{part}")
    assert {name: getattr(module, name) for name in SETTINGS[part]} == SETTINGS[part]


@pytest.mark.parametrize(("slopes", "deepest"), [(True, 512), (False, 1024)])
def test_deep_products_take_large_tiles(slopes, deepest):
    assert [product.tile_for(depth, slopes) for depth in (deepest, deepest + 1)] == [SMALL, LARGE]
    assert product.tile_for(deepest) == SMALL  # where nobody says there are no slopes


def test_registers_of_a_multiprocessor_are_shared_out():
    """65,536 of them, at most 255 a thread, and for attention in eights."""
    assert product.Tile(*LARGE).options() == {"num_warps": 8, "num_stages": 3, "maxnreg": 255}
    assert product.Tile(*SMALL)._replace(per_sm=3).options() == {"num_warps": 4, "num_stages": 3, "maxnreg": 170}
    for width, cut, registers in ((16, (64, 64, 4), 168), (64, (64, 64, 4), 168), (65, (64, 32, 4), 255)):
        found = attention._options(attention.KEYS, width)
        assert (found["OWN"], found["STEP"], found["num_warps"], found["maxnreg"]) == (*cut, registers)
        assert (found["WIDTH"], found["FAR_STAGES"]) == (width, 2) and found["NEAR_STAGES"] == 2
    assert attention._options(attention.FORWARD, 64)["FAR_STAGES"] == 3


def test_what_a_gpu_computes_otherwise_than_the_interpreter(monkeypatch):
    """bf16 alone takes the hardware's tanh, and Hoppers alone the fused products."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for interpreted in (False, True):
        monkeypatch.setattr(rows, "INTERPRETED", interpreted)
        found = [rows.approximate(torch.empty(0, dtype=dtype))["APPROXIMATE"] for dtype in dtypes]
        assert found == [not interpreted, False, False, False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 9), (9, 0), (10, 0)][device])
    assert [product._hopper.__wrapped__(device) for device in range(3)] == [False, True, False]


def on_gpu(*shape: int, dtype=torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype).as_subclass(OnGPU)


def test_what_kernels_run_on(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    common.check(on_gpu(1))
    with pytest.raises(RuntimeError, match="CUDA device, and these are on meta: move"):
        common.check(torch.empty(1, device="meta"))
    for interpreted in (False, True):
        monkeypatch.setattr(capped, "INTERPRETED", interpreted)
        x = torch.empty(1, 4, 5)
        assert capped.available(x.as_subclass(OnGPU), 3) and capped.available(x, 3) == interpreted
        assert not capped.available(x.to("meta"), 3)


def test_fused_products_are_of_hoppers_and_16_bits(monkeypatch):
    asked, w = [], torch.empty(2, 8, 16)
    monkeypatch.setattr(product, "INTERPRETED", False)
    for hopper in (True, False):
        monkeypatch.setattr(product, "_hopper", lambda device, hopper=hopper: asked.append(device) or hopper)
        found = [
            product.fusible(on_gpu(2, 3, 8, dtype=dtype), w) for dtype in (torch.bfloat16, torch.half, torch.float)
        ]
        assert found == [hopper, hopper, False]
    assert asked == [None] * 6  # the one that it lies on


@pytest.mark.parametrize(("rows", "programs"), [(5, 2), (300, 14)])
def test_programs_of_a_product_are_as_many_as_tiles_or_as_fit_on_the_gpu(monkeypatch, rows, programs):
    grids, tile = [], product.Tile(16, 32, 16, 16, warps=4, stages=2, per_sm=2)
    monkeypatch.setattr(product, "_multiprocessors", {None: 7}.get)

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **keys: grids.append(grid)

    monkeypatch.setattr(product, "_product_kernel", Launch())
    product.product(on_gpu(2, rows, 16), on_gpu(2, 16, 24), on_gpu(2, rows), tile=tile)
    assert grids == [(programs,)]


def test_a_gpus_multiprocessors_are_asked_for_by_its_number(monkeypatch):
    properties = {3: SimpleNamespace(multi_processor_count=132)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    assert product._multiprocessors.__wrapped__(3) == 132


def test_gradients_of_wide_weights_leave_a_gpus_product_unrounded(monkeypatch):
    """A CPU's product can't; where it is to be as narrow as the factors, nothing is asked for."""
    asked, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **keys: asked.append(keys) or bmm(a, b))
    for dtype, keys in ((torch.float32, {"out_dtype": torch.float32}), (torch.bfloat16, {}), (torch.float64, {})):
        layer._bmm(on_gpu(1, 2, 3), on_gpu(1, 3, 2), dtype)
        assert asked.pop() == keys
    assert layer._bmm(torch.ones(1, 2, 3).half(), torch.ones(1, 3, 2).half(), torch.float32).dtype == torch.float32
    assert asked == [{}]


@pytest.mark.parametrize(("index", "entered"), [(1, False), (0, True)])
def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch, index, entered):
    x = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: ("device of", x))
    assert common.device_of(x) == (("device of", x) if entered else common._HERE)
    assert common.device_of(torch.empty(1)) is common._HERE


def test_where_nothing_is_said_products_are_fused_and_nothing_is_written_down():
    defaults = {
        name: argument.default for name, argument in inspect.signature(kernels.expert_choice).parameters.items()
    }
    keys = {"scale": 1.0, "cutoff": None, "statistics": None, "kernels": "triton"}
    assert keys.items() <= defaults.items()
    assert inspect.signature(kernels.experts).parameters["kernels"].default == "triton"


def test_rows_are_counted_in_64_bits():
    """Places of numbers, such as e k f, exceed 2^31 only at sizes for which no test has the memory."""
    modules = (choice, loss, routing, rows, selection)
    every = {name: one for module in modules for name, one in vars(module).items() if isinstance(one, kernel)}
    narrow = re.compile(r"tl\.program_id\(0\)(?! == 0|\.to\(tl\.int64\))")
    found = {name for name, one in every.items() if narrow.search(inspect.getsource(one.jit.fn))}
    assert found == {"_invert_kernel", "_logits_dw_kernel", "_sum_kernel"}  # of e k slots, which are int32; d; d e


def test_sizes_of_grids_and_blocks():
    assert [cdiv(size, 4) for size in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [block(size) for size in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
    assert (block(3, 16), block(100, 16, 64), block(20, 16, 64)) == (16, 64, 32)


def _tripled(x: Tensor) -> Tensor:
    return 3 * x


def test_an_operator_is_registered_under_the_compiler_alone():
    x, graphs, tripled = torch.randn(4), [], Operator(_tripled, torch.empty_like)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: tripled(x), backend=backend, fullgraph=True)
    assert torch.equal(tripled(x), 3 * x) and torch.equal(compiled(x), 3 * x)
    assert any(node.target is torch.ops.ecmoe.tripled.default for node in graphs[0].graph.nodes)
