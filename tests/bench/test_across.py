"""Layers with their experts spread over GPUs: what each process times, and what becomes of one that fails."""

from pathlib import Path

import pytest
import torch

from ecmoe.bench import across


def test_a_rank_is_held_to_the_products_of_its_experts_on_the_tokens_of_all(monkeypatch):
    """Of two ranks, as seen by one: what is shared out, timed, agreed on, and written down."""
    asked, warm = {}, []
    sizes = {"n": 16, "d_model": 8, "d_ff": 12, "num_experts": 4}
    parts = ("forward", "forward + backward")
    calls = [(kind, what) for kind in ("layer", "floor") for what in parts]
    times = {call: [0.001 * n * i for i in (1, 2, 6)] for n, call in enumerate(calls, 1)}

    def share(module, mesh, device):
        (layer,) = module
        asked.update(mesh=mesh, pool=layer.router.pool, kernels=layer.kernels)
        for weight in (layer.w1, layer.w2):
            weight.to_local = lambda weight=weight: weight[:2]

    def floor(local, x, k):
        asked.update(floor=(local.w1.shape, local.w2.shape, x.shape, k))
        return {what: lambda what=what: warm.append(what) for what in parts}

    def in_turns(calls, repeats, device, agreed):
        asked.update(calls=list(calls), repeats=repeats, agreed=agreed({"mine": 1}))
        return times

    monkeypatch.setattr(across.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(across.dist.device_mesh, "init_device_mesh", lambda kind, shape: (kind, shape))
    monkeypatch.setattr(across.dist, "broadcast_object_list", lambda box, src: box.__setitem__(0, {"of": src}))
    monkeypatch.setattr(across, "share_experts", share)
    monkeypatch.setattr(across, "floor", floor)
    monkeypatch.setattr(across.timing, "in_turns", in_turns)
    monkeypatch.setattr(across.timing, "peak_mb", lambda call, device: callable(call) and (1.0, 5.0 * (device == here)))
    here = across.timing.this_device()
    table = across.of_this_rank(repeats=3, **sizes)
    kind = here.type
    assert asked == {
        "mesh": (kind, (2,)), "pool": "rank", "kernels": "auto", "calls": calls, "repeats": 3, "agreed": {"of": 0},
        "floor": ((2, 8, 12), (2, 12, 8), (16, 8), 16),  # k = n c / e of each of two
    }  # fmt: skip
    assert warm == [what for what in parts for _ in range(across.timing.WARM_UP[kind])]
    rows = table.to_dict("records")
    assert [(row["devices"], row["what"], row["peak_mb"]) for row in rows] == [(2, what, 5.0) for what in parts]
    found = [(row["ms"], row["floor_ms"], row["share_of_floor"]) for row in rows]
    assert found == [pytest.approx(row) for row in ((2.0, 6.0, 3.0), (4.0, 8.0, 2.0))]  # medians
    assert (sizes | {"repeats": 3}).items() <= table.attrs["setting"].items()


def test_layers_are_timed_by_as_many_processes_each_size_and_number(monkeypatch):
    sizes, asked = {"a": {"n": 4}, "b": {"n": 8}}, []

    def spawn(work, given, processes):
        ranks, folder, keys = given
        asked.append((work, ranks, keys, processes))
        if ranks == 4 and keys["n"] == 4:
            raise RuntimeError(f"-- Process 1 --\n\nValueError: {500 * 'no '}\n")
        across.timing.save(across.timing.tabled([{"ms": float(ranks)}], [], {}), Path(folder) / "table.json")

    monkeypatch.setattr(across.torch.multiprocessing, "spawn", spawn)
    tables = list(across.bench_across(sizes, [2, 4], repeats=7))
    assert asked == [(across._rank, n, of | {"repeats": 7}, n) for of in sizes.values() for n in (2, 4)]
    assert [table.to_dict("records") for table in tables[1:]] == [
        [{"size": "a", "ms": 2.0}], [{"size": "a", "ms": 2.0}, {"size": "b", "ms": 2.0}],
        [{"size": "a", "ms": 2.0}, {"size": "b", "ms": 2.0}, {"size": "b", "ms": 4.0}]]  # fmt: skip
    assert [len(table.attrs["absent"]) for table in tables] == [0, 1, 1, 1] and tables[0].attrs["setting"][
        "repeats"
    ] == 7
    assert tables[-1].attrs["absent"] == [f"a on 4 ({('ValueError: ' + 500 * 'no ')[:160]})"]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_joins_the_others_and_the_first_writes(rank, cuda, tmp_path, monkeypatch):
    said = []
    note = lambda name: lambda *given, **keys: said.append((name, given, keys))  # noqa: E731
    monkeypatch.setattr(across.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(across.torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(across.torch, "set_num_threads", note("threads"))
    monkeypatch.setattr(across.dist, "init_process_group", note("in"))
    monkeypatch.setattr(across.dist, "destroy_process_group", note("out"))
    thread = torch._C._is_multithreading_enabled  # whether backward passes run in another one than in training
    monkeypatch.setattr(across, "of_this_rank", lambda **sizes: said.append((sizes, thread())) or "table")
    monkeypatch.setattr(across.timing, "save", note("save"))
    across._rank(rank, 3, str(tmp_path), {"n": 4, "repeats": 2})
    group = (("nccl" if cuda else "gloo", f"file://{tmp_path}/ranks"), {"rank": rank, "world_size": 3})
    expected = [
        ("threads", (1,), {}),
        *[("device", (rank,), {})] * cuda,
        ("in", *group),
        ({"n": 4, "repeats": 2}, False),
    ]
    assert said == [*expected, *[("save", ("table", tmp_path / "table.json"), {})] * (rank == 0), ("out", (), {})]


def test_shared_layers_are_held_to_the_products_of_a_rank_and_what_fails_is_named():
    sizes = {"n": 64, "d_model": 32, "d_ff": 64, "num_experts": 4}
    first, table = across.bench_across({"small": sizes, "odd": sizes | {"num_experts": 3}}, [2], repeats=2)
    assert len(first) == 2 and not first.attrs["absent"]  # kept before the next is begun
    rows = table.to_dict("records")
    assert [(row["size"], row["devices"], row["what"]) for row in rows] == [
        ("small", 2, "forward"), ("small", 2, "forward + backward")]  # fmt: skip
    assert all(row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"]) for row in rows)
    (absent,) = table.attrs["absent"]
    assert absent.startswith("odd on 2 (") and "Error" in absent
