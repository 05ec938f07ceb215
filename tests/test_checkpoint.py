import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lco_lite.checkpoint import (
    capture_rng,
    checkpoints,
    load_latest,
    pack,
    restore_rng,
    save_checkpoint,
    unpack,
)
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import recover

# a stage in miniature: dropout draws from torch, the data order from numpy, the noise from Python
TRAINING = """
import random, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from lco_lite.checkpoint import load_latest, save_checkpoint

def build(fused):
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    groups = [{"params": net[0].parameters(), "betas": (0.8, 0.95)}, {"params": net[2].parameters(), "lr": 3e-3}]
    return net, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=fused)

def train(folder, stop, fused=False, every=1):
    net, optimizer = build(fused)
    found = load_latest(folder, optimizer)
    start = 0 if found is None else found.step
    if found is not None:
        net.load_state_dict(found.tensors)
    for step in range(start, stop):
        x = torch.from_numpy(np.random.randn(4, 6)).float() + random.random()
        loss = net(x).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        if (step + 1) % every == 0:
            save_checkpoint(folder, step + 1, net.state_dict(), optimizer, {"next": [step, {"a": step + 1}]})
    return net

if __name__ == "__main__":
    train(Path(sys.argv[1]) / "plain", int(sys.argv[2]), False)
    train(Path(sys.argv[1]) / "fused", int(sys.argv[2]), True)
"""
ROOT = Path(__file__).parent.parent


def training() -> dict:
    namespace: dict = {"__name__": "training"}
    exec(TRAINING, namespace)
    return namespace


def parameters(tmp_path: Path, step: int, value: float = 1.0) -> Path:
    return save_checkpoint(tmp_path, step, {"w": torch.full((3,), value)}, None, {"step": step})


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_a_stage_resumed_in_a_new_process_ends_with_the_same_weights_to_the_bit(tmp_path):
    subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path), "3"], check=True, cwd=ROOT, timeout=300)
    train = training()["train"]
    for kind, fused in (("plain", False), ("fused", True)):
        unbroken, resumed = train(tmp_path / f"whole-{kind}", 7, fused), train(tmp_path / kind, 7, fused)
        for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_optimizer_comes_back_exactly_with_its_groups_and_tuples(tmp_path):
    _, optimizer = training()["build"](False)
    training()["train"](tmp_path, 2)
    load_latest(tmp_path, optimizer)
    groups = optimizer.state_dict()["param_groups"]
    assert [g["betas"] for g in groups] == [(0.8, 0.95), (0.9, 0.999)]
    assert [g["lr"] for g in groups] == [1e-2, 3e-3]
    assert [s["step"].item() for s in optimizer.state_dict()["state"].values()] == [2.0] * 4


def test_tensors_keep_type_shape_and_value_and_may_share_memory(tmp_path):
    whole = torch.arange(12, dtype=torch.float32)
    tensors = {
        "view": whole[2:6],
        "same": whole,
        "transposed": whole.view(3, 4).T,
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "long": torch.tensor(7),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    save_checkpoint(tmp_path, 1, tensors, None, {})
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_tensors_and_optimizer_come_back_where_they_were(tmp_path):
    weight = nn.Parameter(torch.randn(5, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.square().sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, {"w": weight}, optimizer, {})
    again = torch.optim.AdamW([nn.Parameter(torch.zeros(5, device="cuda"))], fused=True)
    found = load_latest(tmp_path, again, torch.device("cuda"))
    assert found is not None and found.tensors["w"].is_cuda and torch.equal(found.tensors["w"], weight)
    for name, tensor in optimizer.state_dict()["state"][0].items():
        restored = again.state_dict()["state"][0][name]
        assert restored.device == tensor.device and torch.equal(restored, tensor)


def test_the_state_of_the_stage_comes_back_as_it_was(tmp_path):
    state = {"epoch": 1, "order": [3, 1, 2], "nested": {"rewards": [0.1, -1.0], "text": "ü\n", "none": None}}
    save_checkpoint(tmp_path, 5, {}, None, state)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 5 and found.state == state


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    training()["train"](tmp_path, 1)
    files = sorted(p.name for p in checkpoints(tmp_path)[0].iterdir())
    assert files == ["optimizer.safetensors", "state.json", "tensors.safetensors"]


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path):
    assert load_latest(tmp_path / "never-made") is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        parameters(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]


def test_one_that_a_kill_kept_from_being_removed_goes_when_the_stage_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("lco_lite.checkpoint.remove", lambda path: None)
    for step in (1, 2, 3):
        parameters(tmp_path, step)
    monkeypatch.undo()
    assert load_latest(tmp_path).step == 3
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip_a_byte, lambda p: p.write_bytes(p.read_bytes()[:-20]), Path.unlink])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_is_named(tmp_path, file, damage):
    parameters(tmp_path, 1, 1.0)
    newest = parameters(tmp_path, 2, 2.0)
    damage(newest / file)
    with pytest.warns(UserWarning) as warned:
        found = load_latest(tmp_path)
    assert found is not None and found.step == 1 and found.tensors["w"].tolist() == [1, 1, 1]
    assert len(warned) == 1 and f"{newest} is damaged" in str(warned[0].message)


def test_when_all_are_damaged_the_user_is_told_instead_of_starting_over(tmp_path):
    for step in (1, 2):
        (parameters(tmp_path, step) / "state.json").write_text("[]")
    with pytest.warns(UserWarning), pytest.raises(UsageError, match="--fresh"):
        load_latest(tmp_path)


def test_saving_after_going_back_removes_the_damaged_ones_ahead(tmp_path):
    for step in (1, 2, 9):
        parameters(tmp_path, step)
    (tmp_path / "step-00000009" / "state.json").write_text("")
    parameters(tmp_path, 3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        parameters(tmp_path, 4, value)
    found = load_latest(tmp_path)
    assert found is not None and found.tensors["w"][0] == 2.0


def test_a_checkpoint_of_another_format_is_not_misread(tmp_path, monkeypatch):
    monkeypatch.setattr("lco_lite.checkpoint.FORMAT", 2)
    parameters(tmp_path, 1)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="format 2"), pytest.raises(UsageError):
        load_latest(tmp_path)


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    parameters(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LcoError, match="disk is full"):
        parameters(tmp_path, 2)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1


def draw() -> list[float]:
    drawn = [random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]
    return drawn + ([torch.rand((), device="cuda").item()] if torch.cuda.is_available() else [])


def test_every_random_state_comes_back_also_between_the_two_halves_of_a_gauss_pair():
    draw()
    tensors, states = capture_rng()
    first = [draw() for _ in range(3)]
    draw()
    restore_rng(tensors, json.loads(json.dumps(states)))
    assert [draw() for _ in range(3)] == first


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=12,
)


@given(trees)
def test_packing_loses_nothing_on_the_way_through_json(tree):
    packed = json.loads(json.dumps(pack(tree, {}, "x"), allow_nan=False))
    again = unpack(packed, {})
    assert again == tree and repr(again) == repr(tree)


def test_packing_refuses_what_it_could_not_bring_back():
    with pytest.raises(TypeError, match="x.a: a set"):
        pack({"a": {1, 2}}, {}, "x")


# forks writers and kills each at a random instant; imports torch once
KILLING = """
import itertools, os, random, select, signal, sys, time, warnings
from pathlib import Path
import torch
from lco_lite.checkpoint import load_latest, save_checkpoint

def write(folder, pipe):
    found = load_latest(folder)
    for step in itertools.count(found.step + 1 if found else 1):
        for again in range(2):  # the second replaces the first
            save_checkpoint(folder, step, {"w": weight + step}, optimizer, {"step": step})
        os.write(pipe, b"%d " % step)

folder, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(1)
torch.set_num_threads(1)
warnings.simplefilter("error")  # a damaged checkpoint would be told of
weight = torch.zeros(20_000)
optimizer = torch.optim.AdamW([torch.nn.Parameter(weight)])
for _ in range(kills):
    reading, writing = os.pipe()
    writer = os.fork()
    if writer == 0:
        write(folder, writing)
    os.close(writing)
    said = os.read(reading, 100)
    deadline = time.monotonic() + draw.uniform(0, 0.15)
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            said += os.read(reading, 100)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    while more := os.read(reading, 100):
        said += more
    os.close(reading)
    saved = int(said.split()[-1])
    found = load_latest(folder)
    # a step that was being replaced may have stepped aside; the one before it is whole
    assert saved - 1 <= found.step == found.state["step"] == found.tensors["w"][0].item(), (found, saved)
print("left over", len(list(folder.glob(".*"))))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its writers")
def test_a_writer_killed_at_any_instant_leaves_a_checkpoint_that_loads(tmp_path):
    command = [sys.executable, "-c", KILLING, str(tmp_path), "12"]
    done = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout != "left over 0\n", "no kill came in the middle of a write: the test shows nothing"
    recover(tmp_path)
    assert list(tmp_path.glob(".*")) == []
    assert load_latest(tmp_path) is not None
