"""What tests share: a home of their own, one thread, the smallest run that trains, and a quick round without training."""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import socket
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # workers of pytest-xdist share the cores; also for child processes
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

import ecmoe.cli  # noqa: F401  # before jsonschema: it leaves out a package that takes seconds to import
from ecmoe.config import RunConfig

gc.disable()  # until all tests are collected: there is hardly any garbage among what they import
if not torch.cuda.is_available():  # ecmoe/kernels then run in the interpreter; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton")
if INTERPRETED:
    from triton.runtime import interpreter

    # Twice as fast, and the same: a device function of ours finds the language patched by the launch, so it is not
    # patched again at each call; and no overflow of integers is worked out that then isn't reported.
    @functools.cache
    def ours(function):
        return function.fn.__module__.startswith("ecmoe.")

    def call(function, *args, **keys):
        return function.rewrite()(*args, **keys) if ours(function) else patching(function, *args, **keys)

    patching = interpreter.InterpretedFunction.__call__
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Runs, caches and reports of a session lie in a folder of its own, never in the checkout."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("home")
    before = os.environ.get("ECMOE_HOME")
    os.environ["ECMOE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["ECMOE_HOME"]
    else:
        os.environ["ECMOE_HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def folders():
    """A folder lists its files in any order: here backwards, so that who relies on the one that a disk happens to have is seen."""

    class Backwards(contextlib.ExitStack):
        def __init__(self, entries):
            super().__init__()
            with entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)

        def __iter__(self):
            return self

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    scandir, listdir = os.scandir, os.listdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", lambda path=".": Backwards(scandir(path)))
        patch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """What `settled` has frozen stays so when a run ends."""
    from ecmoe.training import recorder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "gc", SimpleNamespace(collect=gc.collect, freeze=gc.freeze, unfreeze=lambda: None))
        yield


@pytest.fixture(autouse=True)
def settled(frozen):
    """Garbage collections skip what was there before the test, mostly imported modules: looking through all takes 0.3 s,
    and each measurement on a trained model begins and ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def library():
    """The standard library, the text of most runs here, is listed once."""
    from ecmoe import paths

    place, listed = Path(sysconfig.get_path("stdlib")), functools.cache(paths.files_below)

    def files_below(path, *how, **keys):
        return dict(listed(path, *how, **keys)) if path == place else below(path, *how, **keys)

    below = paths.files_below
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "files_below", files_below)
        yield


def pytest_addoption(parser):
    help = "skip tests where they begin to train, to compile, to interpret a kernel or to start a process"
    parser.addoption("--quick", action="store_true", help=help)


def pytest_configure(config):
    """Random problems are the same each time: a failure is a failure, not bad luck. Nothing is written to disk."""
    count = 40 if config.getoption("--quick") else 200
    settings.register_profile("ours", max_examples=count, deadline=None, derandomize=True, database=None)
    settings.load_profile("ours")


@pytest.fixture(scope="session", autouse=True)
def quick(request):
    """With --quick, a test ends as skipped where it begins to train, to compile, to interpret a kernel or to start a process. No list."""
    if not request.config.getoption("--quick"):
        yield
        return
    import lightning

    from ecmoe.continual import expert_gate, learning

    def ends(why):
        return lambda *_, **__: pytest.skip(why)

    def start(process, args, *rest, **keys):
        if isinstance(args, list | tuple) and os.path.basename(str(args[0])).startswith(("python", "torchrun")):
            pytest.skip("starts Python")
        return popen(process, args, *rest, **keys)

    popen = subprocess.Popen.__init__
    with pytest.MonkeyPatch.context() as patch:
        for trainer in (lightning.Trainer, expert_gate, learning):
            patch.setattr(trainer, "fit", ends("trains"))
        patch.setattr(torch, "compile", ends("compiles"))
        patch.setattr(subprocess.Popen, "__init__", start)
        patch.setattr(multiprocessing.process.BaseProcess, "start", ends("starts a process"))
        if INTERPRETED:
            patch.setattr(interpreter.GridExecutor, "__call__", ends("interprets a kernel"))
        yield


@pytest.fixture(autouse=True)
def exact_products():
    """Oracles multiply in float32, whatever a run before has allowed (training on a GPU allows TF32)."""
    torch.set_float32_matmul_precision("highest")


def _rank(rank: int, port: int, work, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results.put((rank, work(rank)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # else who asked would wait for an answer
        results.put((rank, repr(error)))
        raise


@pytest.fixture(scope="session")
def forked():
    """`forked(work)`: a process that does it, begun; it has all that is imported here."""

    def first(work, *args) -> None:
        torch.set_num_threads(1)  # else two threads that renew the parent's pool at once, as gloo's may, find none
        work(*args)

    def start(work, *args) -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=first, args=(work, *args))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def free_port():
    """`free_port()`: one on which nobody listens."""

    def port() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return port


@pytest.fixture(scope="session")
def two_ranks(forked, free_port):
    """`two_ranks(work)`: [work(0), work(1)], each in a process of a gloo group of two; what it returns must be no tensor."""

    def run(work) -> list:
        results, port = multiprocessing.get_context("fork").Queue(), free_port()
        ranks = [forked(_rank, rank, port, work, results) for rank in range(2)]
        found = dict(results.get(timeout=90) for _ in ranks)
        for rank in ranks:
            rank.join(timeout=60)
        assert not any(rank.exitcode for rank in ranks), found
        return [found[0], found[1]]

    return run


@pytest.fixture(scope="session")
def committed_verdicts():
    """Claim -> verdict, of the results in reports/gpu, which take seconds to judge."""
    from ecmoe.study.verdict import judge_all

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECMOE_HOME", str(Path(__file__).parents[1]))
        return judge_all("gpu")


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**changes)`: a config that trains in about a second, on real text."""

    def make(**changes) -> RunConfig:
        tiny = {
            "layers": 2, "d_model": 16, "d_ff": 32, "heads": 2, "num_experts": 4, "sequence_length": 16,
            "batch_size": 8, "steps": 10, "warmup_steps": 2, "eval_every": 4, "eval_batches": 2,
            "max_bytes": 200_000, "learning_rate": 1e-2,
        }  # fmt: skip
        return RunConfig.from_dict(tiny | changes)

    return make
