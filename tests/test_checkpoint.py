"""Checkpoints under damage: another state is never taken for the one that was saved, and what is
whole is found.
"""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dcmdp_jax import checkpoint, sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.records import TrainState

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_of(step):
    """Leaves of several types, of which none is constant."""
    rng = np.random.default_rng(step)
    params = {
        "embed": rng.normal(size=(7, 5)).astype(np.float32),
        "head": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    }
    moments = {"mu": rng.normal(size=(7, 5)).astype(np.float32), "count": np.int32(step)}
    dual = {
        "seen": rng.integers(0, 2, 9).astype(bool),
        "small": rng.integers(-99, 99, (2, 3)).astype(np.int8),
    }
    return jax.tree.map(
        jnp.asarray, TrainState(params, moments, dual, np.int32(step), np.int32(0), ())
    )


def like(state):
    return sharding.abstract_arrays(state, jax.tree.map(lambda _: PLACE, state))


def save(workdir, *steps):
    saved = checkpoint.Checkpoints(workdir, keep=9)
    for step in steps:
        saved.save(state_of(step), {"next_index": 10 * step}, seed=3)
    saved.close()


def restore(workdir):
    """The step that is gone on from; its state and data position are compared with those that were
    saved.
    """
    saved = checkpoint.Checkpoints(workdir, keep=9)
    try:
        state, position = saved.restore(like(state_of(0)))
    finally:
        saved.close()
    step = int(state.step)
    assert_equal(state, state_of(step))
    assert position == {"next_index": 10 * step}
    return step


def assert_equal(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save(folder, 2, 4)
    return folder


@pytest.fixture
def workdir(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_what_is_whole_is_restored_without_a_word(workdir, capsys):
    assert restore(workdir) == 4
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_no_flipped_bit_gives_another_state(workdir, tmp_path, part):
    """In every file, eleven places: the state that was saved, or the one before it."""
    newest = workdir / "checkpoints" / "4"
    seen = set()
    for path in files(newest)[part::4]:
        size = path.stat().st_size
        for place in np.unique(np.linspace(0, size - 1, 11).astype(int)) if size else []:
            shutil.copytree(workdir, tmp_path / "flipped")
            file = tmp_path / "flipped" / path.relative_to(workdir)
            content = bytearray(file.read_bytes())
            content[place] ^= 1 << int(place) % 8
            file.write_bytes(content)
            seen.add(restore(tmp_path / "flipped"))
            shutil.rmtree(tmp_path / "flipped")
    assert seen <= {2, 4} and seen


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed": zeroed,
    "truncated": truncated,
    "gone": pathlib.Path.unlink,
    "of zeros behind": lambda path: path.write_bytes(path.read_bytes() + bytes(9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_fallen_back_from_or_is_no_harm(workdir, tmp_path, damage):
    for path in files(workdir / "checkpoints" / "4"):
        shutil.copytree(workdir, tmp_path / "damaged")
        DAMAGE[damage](tmp_path / "damaged" / path.relative_to(workdir))
        assert restore(tmp_path / "damaged") in (2, 4)
        shutil.rmtree(tmp_path / "damaged")


def data_file(folder):
    """The largest file below a checkpoint's data."""
    return max(
        (path for path in files(folder) if path.parent.name == "d"),
        key=lambda path: path.stat().st_size,
    )


def test_the_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_saves_its_step_anew(
    workdir, capsys
):
    zeroed(data_file(workdir / "checkpoints" / "4"))
    (workdir / "checkpoints" / "9").mkdir()
    assert restore(workdir) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first.startswith(f"checkpoint 9 in {workdir}/checkpoints is damaged (")
        and "going on from checkpoint 2" in first
    )
    assert "checkpoint 4" in second
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        "2",
        "4.damaged",
        "9.damaged",
    ]
    save(workdir, 4)
    assert restore(workdir) == 4 and capsys.readouterr().err == ""
    zeroed(data_file(workdir / "checkpoints" / "4"))
    assert restore(workdir) == 2
    assert (workdir / "checkpoints" / "4.damaged.1").is_dir(), (
        "a second one does not overwrite the first"
    )


def test_where_none_is_whole_nothing_is_moved(workdir):
    for step in ("2", "4"):
        data_file(workdir / "checkpoints" / step).unlink()
    before = files(workdir)
    with pytest.raises(
        checkpoint.NoReadableCheckpoint,
        match="no checkpoint in .* can be read: 4, 2 do not fit .*, or are damaged",
    ) as error:
        restore(workdir)
    assert "\n" not in str(error.value) and files(workdir) == before


def test_readers_of_a_run_fall_back_and_touch_nothing(workdir, capsys):
    state, position = checkpoint.read(workdir, like(state_of(0)))
    assert int(state.step) == 4 and state.opt_state is None
    zeroed(data_file(workdir / "checkpoints" / "4"))
    before = files(workdir)
    state, position = checkpoint.read(workdir, like(state_of(0)))
    assert_equal(state.params, state_of(2).params)
    assert position == {"next_index": 20} and files(workdir) == before
    assert "checkpoint 4" in capsys.readouterr().err
    with pytest.raises(checkpoint.NoReadableCheckpoint, match="holds no checkpoints"):
        checkpoint.read(workdir, like(state_of(0)), before=2)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool"]
)
def test_the_checksum_sees_every_bit(dtype):
    """Each bit of each element flipped, and each pair of elements exchanged."""
    dtype = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    values = np.array([0, 1, 1, 0, 1], bool) if dtype == bool else np.arange(3, 8).astype(dtype)
    changed = [values]
    for i in range(len(values)):
        for bit in range(1 if dtype == bool else 8 * dtype.itemsize):
            raw = bytearray(values.tobytes())
            raw[i * dtype.itemsize + bit // 8] ^= 1 << bit % 8
            changed.append(np.frombuffer(bytes(raw), dtype))
        for j in range(i):
            other = values.copy()
            other[[i, j]] = other[[j, i]]
            if other.tobytes() != values.tobytes():
                changed.append(other)
    found = [checkpoint.checksums([x])["[0]"] for x in map(jnp.asarray, changed)]
    assert found.count(found[0]) == 1


def test_an_even_number_of_flipped_signs_is_seen():
    """A sum of products with odd numbers would not see it: 2^31 times an even number is 0 mod 2^32."""
    x = np.arange(1, 65, dtype=np.float32)
    y = np.where(np.arange(64) < 32, -x, x)
    assert checkpoint.checksums([jnp.asarray(x)]) != checkpoint.checksums([jnp.asarray(y)])


def test_the_checksum_does_not_depend_on_the_mesh():
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    whole = checkpoint.checksums([jnp.asarray(values)])
    for places in (
        sharding.replicated(mesh),
        sharding.batch_sharding(mesh, 0),
        sharding.batch_sharding(mesh, 1),
    ):
        assert checkpoint.checksums([jax.device_put(values, places)]) == whole


def test_checksums_are_those_of_the_formula():
    """Recomputed in NumPy, so that a checkpoint of today is whole tomorrow."""
    values = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    bits = values.view(np.uint32).ravel() ^ np.arange(6, dtype=np.uint32) * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ bits >> np.uint32(shift)) * np.uint32(factor)
    expected = int(np.sum(bits ^ bits >> np.uint32(16), dtype=np.uint64)) % 2**32
    assert checkpoint.checksums({"x": jnp.asarray(values)}) == {"['x']": f"{expected:08x}"}
