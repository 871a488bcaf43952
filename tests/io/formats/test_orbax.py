"""Orbax in JAX, with shardings: it restores what we write, we read what it saved."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megatree.io.formats.orbax import OrbaxReader
from tests.io.formats.in_memory import all_of, samples
from tests.io.formats.test_round_trip import written

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def sharding(*axes: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec(*axes))


def test_jax_restores_what_we_write_under_shardings(tmp_path: Path) -> None:
    tensors = {path: x for path, x in samples().items() if x.numel() and x.dtype.itemsize < 8}
    tensors["zero"] = torch.zeros(4, 4)
    (tmp_path / "ours").mkdir()
    written("orbax", tmp_path / "ours", tensors)

    def target(x: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(x.shape, str(x.dtype)[6:], sharding=sharding(*axes))

    tree = {
        "params": {
            "a": target(tensors["params.a"], "x"),
            "b": {"c": target(tensors["params.b.c"], None, "x")},
        },
        "zero": target(tensors["zero"]),
    }
    got = ocp.StandardCheckpointer().restore(tmp_path / "ours", tree)
    assert got["params"]["a"].sharding == sharding("x")
    assert got["params"]["a"].dtype == jnp.bfloat16
    assert not np.asarray(got["zero"]).any()
    for value, name in ((got["params"]["a"], "params.a"), (got["params"]["b"]["c"], "params.b.c")):
        assert np.array_equal(np.asarray(value, np.float32), tensors[name].float().numpy())


@pytest.mark.parametrize("managed", [False, True])
def test_we_read_what_jax_saved(managed: bool, tmp_path: Path) -> None:
    a = jax.device_put(jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), sharding(None, "x"))
    tree = {"params": {"a": a, "list": [jnp.ones(2), jnp.zeros((2, 3))]}, "step": jnp.asarray(7)}
    if managed:
        manager = ocp.CheckpointManager(tmp_path)
        manager.save(5, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        manager.close()
        folder = tmp_path / "5"
    else:
        folder = tmp_path / "tree"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, tree)
    reader = OrbaxReader(folder)
    got = all_of(reader)
    assert sorted(got) == ["params.a", "params.list.0", "params.list.1", "step"]
    assert got["params.a"].float().tolist() == np.arange(12.0).reshape(3, 4).tolist()
    assert got["params.list.1"].shape == (2, 3)
    assert got["step"].item() == 7
    assert reader.read("params.a", ((1, 2), (2, 4))).float().tolist() == [[6.0, 7.0]]


FOUR_DEVICES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
from pathlib import Path
import jax, numpy as np, jax.numpy as jnp, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from megatree.io.formats.arrays import copy
from megatree.io.formats.orbax import OrbaxReader, OrbaxWriter
folder = Path(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
values = np.arange(64, dtype=np.float32).reshape(8, 8)
with ocp.StandardCheckpointer() as theirs:
    x = jax.device_put(jnp.asarray(values), NamedSharding(mesh, P("a", "b")))
    theirs.save(folder / "theirs", {"w": {"x": x}})
reader = OrbaxReader(folder / "theirs")
assert (reader.read("w.x", ((1, 7), (3, 5))).numpy() == values[1:7, 3:5]).all()
(folder / "ours").mkdir()
copy(reader, OrbaxWriter(folder / "ours", reader.arrays, 100), most_bytes=100)
other = NamedSharding(mesh, P("b", "a"))
target = {"w": {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=other)}}
got = ocp.StandardCheckpointer().restore(folder / "ours", target)["w"]["x"]
assert got.sharding == other and (np.asarray(got) == values).all()
"""


@pytest.mark.full
def test_four_devices_of_jax_and_we_understand_each_other(tmp_path: Path) -> None:
    """Sharded saves write a chunk per device; ours are restored under another sharding."""
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
