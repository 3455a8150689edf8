"""Files: whole or not at all, whatever ends a process; and nothing of YAML that says something else than it seems to."""

import copy
import errno
import hashlib
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from ecmoe import files
from ecmoe.files import (
    ConfigError,
    Damaged,
    assignments,
    check_known,
    check_sum,
    content_sha256,
    nearest,
    parse_yaml,
    read_json,
    read_yaml,
    seal,
    sealed,
    sha256,
    sha256_once,
    write_json,
    write_text,
    written,
)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "in" / "a.json"
    write_json(path, {"x": float("nan"), "t": torch.tensor(2), 3: [float("-inf"), (True, None, path)]})
    with pytest.raises(ZeroDivisionError), written(path) as temporary:
        temporary.write_text("half of")
        raise ZeroDivisionError
    assert read_json(path) == {"x": None, "t": 2, "3": [None, [True, None, str(path)]]}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_file_has_the_users_default_mode_whoever_writes_it(tmp_path):
    (tmp_path / "usual").touch()
    with written(tmp_path / "mine") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))
    assert (tmp_path / "mine").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_is_written_for_people_and_for_every_reader(tmp_path):
    path = tmp_path / "a.json"
    write_json(
        path, {"é": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": np.float64("nan"), "e": ("x", 1.5)}
    )
    assert (
        path.read_text(encoding="utf-8")
        == '{\n "é": 0.5,\n "b": 3,\n "c": true,\n "d": null,\n "e": [\n  "x",\n  1.5\n ]\n}\n'
    )
    write_json(path, {"a": {"b": 1}}, indent=None)
    assert path.read_text() == '{"a": {"b": 1}}\n'


def test_what_a_name_points_to_is_on_the_disk_before_it(tmp_path, monkeypatch):
    did, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: did.append("content") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: did.append((str(old), new)) or replace(old, new))
    write_text(tmp_path / "a", "ü")
    assert did == ["content", (str(tmp_path / f".a.{os.getpid()}.tmp"), tmp_path / "a")]
    assert (tmp_path / "a").read_bytes() == "ü".encode()


def test_a_killed_writer_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "old")
    script = f"""
        import os, pathlib, signal
        from ecmoe.files import written
        with written(pathlib.Path({str(tmp_path / "a")!r})) as temporary:
            temporary.write_text("new"); os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"


def test_two_writers_of_one_file_never_meet(tmp_path):
    script = f"""
        import pathlib
        from ecmoe.files import write_json, read_json
        for i in range(60):
            write_json(pathlib.Path({str(tmp_path / "a.json")!r}), dict.fromkeys(map(str, range(99)), i))
            assert len(set(read_json(pathlib.Path({str(tmp_path / "a.json")!r})).values())) == 1
    """
    both = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0] and os.listdir(tmp_path) == ["a.json"]


TOLD = {
    errno.ENOSPC: ("No space left on device", "free some space"),
    errno.EDQUOT: ("Disk quota exceeded", "free some space"),
    errno.EFBIG: ("File too large", "raise the limit (ulimit -f)"),
}
# As safetensors reports an error of the disk: without errno.
RUST = "Error while serializing: I/O error: {} (os error {})"
TORCH = RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/3")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        *((OSError(number, words), number) for number, (words, _) in TOLD.items()),
        *((ValueError(RUST.format(words, number)), number) for number, (words, _) in TOLD.items()),
        (TORCH, errno.ENOSPC),
    ],
)
def test_a_full_disk_is_told_with_file_and_remedy(tmp_path, monkeypatch, error, number):
    (words, remedy), path = TOLD[number], tmp_path / "a.json"
    free = {tmp_path: 2**20 - (error is TORCH)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, free[path]))
    with pytest.raises(OSError) as told, written(path):
        raise error
    said = f"{words}, for {path}: {remedy}, then call again; what was finished is kept"
    assert (told.value.errno, told.value.strerror) == (number, said) and not os.listdir(tmp_path)


@pytest.mark.parametrize("file", ["weights", "text"])
def test_a_limit_on_the_size_of_files_is_told_by_every_writer(tmp_path, file):
    """In a process with such a limit: safetensors and Python each report the error in their own way."""
    script = f"""
        import pathlib, resource, torch
        from safetensors.torch import save_file
        from ecmoe.files import written
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with written(pathlib.Path({str(tmp_path / "a")!r})) as temporary:
                if {file == "weights"}:
                    save_file({{"w": torch.zeros(1000)}}, temporary)
                else:
                    temporary.write_text("x" * 4000)
        except OSError as error:
            print(error)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True).stdout
    assert f"File too large, for {tmp_path / 'a'}: raise the limit (ulimit -f)" in said
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        ValueError(RUST.format("Permission denied", 13)),
        RuntimeError("PytorchStreamWriter failed"),
    ],
)
def test_another_error_is_told_as_it_is(tmp_path, monkeypatch, error):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**21, 2**20, 2**20))
    with pytest.raises(type(error)) as told, written(tmp_path / "a.json"):
        raise error
    assert told.value is error and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("lr", ["lower", "learning_rate"], "did you mean learning_rate?"),  # by its initials, though another is alike
        ("stesp", ["seed", "steps"], "did you mean steps?"),
        ("Learning-Rates", ["steps", "learning_rate"], "did you mean learning_rate?"),
        ("dense", ["hash", "DENSE"], "did you mean DENSE?"),
        ("a-b-c-d", ["e", "a_b_c_d"], "did you mean a_b_c_d?"),
        ("a_b_c_d", ["e", "A-B-C-D"], "did you mean A-B-C-D?"),
        ("convergence", ["00_start", "01_convergence"], "did you mean 01_convergence?"),
        ("GENCE", ["00_start", "01_convergence"], "did you mean 01_convergence?"),
        ("01_", ["00_start", "01_convergence_of_all"], "did you mean 01_convergence_of_all?"),
        ("01", ["01_convergence_of_all"], "must be one of 01_convergence_of_all"),  # too short to mean one
        (7, ["one", "two"], "must be one of one, two"),
        ("x", [], "must be one of none"),
    ],
)
def test_an_unknown_name_suggests_the_one_that_may_be_meant(name, known, said):
    assert nearest(name, iter(known)) == said
    assert nearest(name, known, "see there") == (said if "mean" in said else "see there")
    with pytest.raises(ConfigError) as error:
        check_known("no page", [*known, name], known)
    assert str(error.value) == f"no page {name!r}: {said}"
    with pytest.raises(ConfigError) as error:
        check_known("no page", [name], known, "see there")
    assert str(error.value).endswith(said if "mean" in said else ": see there")


def test_what_is_set_is_yaml_after_the_first_equals_sign():
    assert assignments(["a=1", " b = x=y", "c=", "d=1.0e-3", "a=[2]"]) == {"a": [2], "b": "x=y", "c": None, "d": 1e-3}
    assert assignments(None) == {}
    for pair in ("a", "=1", " =1"):
        with pytest.raises(ConfigError, match=f"--set '{pair}' must be key=value"):
            assignments([pair])
    with pytest.raises(ConfigError, match=r"--set 'a=\[': '\[' is no YAML value: while parsing"):
        assignments(["a=["])


@pytest.mark.parametrize("content", [b'{"a": ', '{"a": "ü'.encode()[:-1], b"[1]", b"", b"[" * 100_000])
def test_damaged_json_is_named_with_its_remedy(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json is damaged .* delete it"):
        read_json(tmp_path / "a.json")


def test_a_key_that_a_stored_file_lacks_is_named_with_the_file(tmp_path):
    """At any depth. Whoever asks whether it is there is told, as of any dict."""
    path = tmp_path / "a.json"
    write_json(path, {"setting": {"n": 1}, "rows": [{"ms": 2.0}]}, sealed=True)
    for of in (stored := read_json(path, sealed=True), copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert of == {"setting": {"n": 1}, "rows": [{"ms": 2.0}]} and of["rows"][0]["ms"] == 2.0
        assert "x" not in of and of.get("x", 3) == 3 and of.pop("x", 4) == 4
        for there in (of, of["setting"], of["rows"][0]):
            with pytest.raises(Damaged) as error:
                there["x"]
            assert str(error.value) == f"{path} is damaged (it has no x): delete it, then compute it again"
        with pytest.raises(Damaged, match=r"a\.json is damaged \(it has no device\)"):
            "{n} on {device}".format_map(of["setting"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps: 10\nseed: 1\nsteps: 20\n", "(?s)key 'steps' occurs twice.*line 3"),
        ("base: {d_ff: 1, d_ff: 2}", "key 'd_ff' occurs twice"),
        ("arms: [{a: 1, a: 1}]", "key 'a' occurs twice"),
        ("steps: 010\n", "(?s)takes 010 for 8: .*steps: 010"),
        ("steps: -0_7\n", "takes -0_7 for -7"),
        ("seeds: [1, 1:30]\n", "takes 1:30 for 90"),
        ("learning_rate: 1:30.5\n", "takes 1:30.5 for 90.5"),
        ("steps: !!bool x", "a value doesn't fit its type .*: correct it, or put it in quotes"),
        ("steps: !!timestamp x", "a value doesn't fit its type"),
        ("[" * 10_000, "nested too deeply"),
        ("seed: 2024-13-45\n", "month must be in"),
        ("!!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("? [1]\n: 2", "unhashable"),
        ("? [1]\n: 2\n? [1]\n: 3", "unhashable"),
        ("!!map [a, b]", "expected a mapping node"),
        ("!!map x", "expected a mapping node"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_yaml_says_what_it_seems_to_say_or_nothing(tmp_path, text, named):
    with pytest.raises(ConfigError, match=named):
        parse_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config '.*a\.yaml' can't be read"):
        read_yaml(tmp_path / "a.yaml", "config")


def test_other_yaml_is_as_ever():
    text = "a: &x {b: 1_000, c: 0, d: 0x10}\ne:\n  <<: *x\n  b: -3\n"
    assert parse_yaml(text) == {"a": {"b": 1000, "c": 0, "d": 16}, "e": {"b": -3, "c": 0, "d": 16}}


def test_sha256_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


def test_the_sha256_of_several_files_is_of_names_and_contents_each_read_once(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "y").write_bytes(b"")
    lines = "".join(
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in (("one", b"abc"), ("\udcff", b""))
    )
    read = []
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or sha256(path))
    for _ in range(2):
        found = content_sha256({"one": tmp_path / "x", os.fsdecode(b"\xff"): tmp_path / "y"})
        assert found == hashlib.sha256(os.fsencode(lines)).hexdigest() and read == [tmp_path / "x", tmp_path / "y"]
    (tmp_path / "x").write_bytes(b"abd")
    assert sha256_once(tmp_path / "x") == hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(ConfigError, match=r"gone can't be read: No such file or directory$"):
        content_sha256({"a": tmp_path / "gone"})


def test_a_check_sum_is_of_keys_and_values_in_any_order(tmp_path):
    value, other = {"b": 1, "a": [2]}, {"a": [2], "b": 1}
    assert check_sum(value) == check_sum(other) == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()[:16]
    path = tmp_path / "a.json"
    write_json(path, value, sealed=True)
    assert read_json(path) == {**value, "check": check_sum(value)} and read_json(path, sealed=True) == value
    write_json(path, value)
    with pytest.raises(Damaged, match="check sum"):  # it has none
        read_json(path, sealed=True)


@pytest.mark.parametrize("indent", [1, None])
def test_every_flipped_bit_of_sealed_json_is_named(tmp_path, indent):
    """Also one that leaves the value: 4.5295867919921874 is the same float as 4.5295867919921875, and 1E-07 as 1e-07."""
    path, value = tmp_path / "a.json", {"ü": [4.5295867919921875, 1e-07, None, True]}
    write_json(path, value, indent=indent, sealed=True)
    good = path.read_bytes()
    assert read_json(path, sealed=True) == value
    for at, bit in itertools.product(range(len(good)), range(8)):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
        with pytest.raises(Damaged, match=r"a\.json is damaged"):
            read_json(path, sealed=True)
            raise AssertionError(f"bit {bit} of byte {at} was believed: {path.read_bytes()}")


def test_a_sealed_file_shows_any_change_and_keeps_what_it_holds(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100)
    before = sha256(path)
    assert not sealed(path)
    seal(path)
    assert path.read_bytes() == b"abc" * 100 + before.encode() and sealed(path)
    for at in (0, 150, -1):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        (tmp_path / "b").write_bytes(content)
        assert not sealed(tmp_path / "b")
