"""Checkpoints under damage: nothing is taken for the state that was saved but that state, and an
intact checkpoint is found.
"""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models.quantized import SCALED, quantize
from dcmdp_jax.records import Before, TrainState
from dcmdp_jax.run import checkpoint

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
        saved.save(state_of(step), {"next_index": 10 * step})
    saved.close()


def restore(workdir):
    """Restores a checkpoint, compares its state and data position with what was saved, and returns
    its step.
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
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    save(folder, 2, 4)
    return folder


@pytest.fixture
def workdir(intact, tmp_path):
    """A folder with the checkpoints 2 and 4."""
    shutil.copytree(intact, tmp_path / "run")
    return tmp_path / "run"


def test_an_intact_checkpoint_is_restored_without_a_word(workdir, capsys):
    assert restore(workdir) == 4
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_no_flipped_bit_gives_another_state(workdir, tmp_path, part):
    """At eleven bytes of every file: the state that was saved, or the one before it."""
    newest = workdir / "checkpoints" / "4"
    seen = set()
    for path in files(newest)[part::4]:
        size = path.stat().st_size
        for offset in np.unique(np.linspace(0, size - 1, 11).astype(int)) if size else []:
            shutil.copytree(workdir, tmp_path / "flipped")
            file = tmp_path / "flipped" / path.relative_to(workdir)
            content = bytearray(file.read_bytes())
            content[offset] ^= 1 << int(offset) % 8
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


@pytest.fixture
def damaged(workdir):
    """Checkpoint 2 is intact, 4 is full of zeros, 9 is an empty folder."""
    zeroed(data_file(workdir / "checkpoints" / "4"))
    (workdir / "checkpoints" / "9").mkdir()
    return workdir


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_the_run_goes_on_from_the_checkpoint_before_the_damaged_ones(damaged):
    assert restore(damaged) == 2


def test_damaged_checkpoints_are_named(damaged, capsys):
    restore(damaged)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"checkpoint 9 in {damaged}/checkpoints is damaged (")
    assert "going on from checkpoint 2" in first
    assert "checkpoint 4" in second


def test_damaged_checkpoints_are_renamed_so_that_their_steps_can_be_saved_again(damaged, capsys):
    restore(damaged)
    assert names(damaged) == ["2", "4.damaged", "9.damaged"]
    save(damaged, 4)
    capsys.readouterr()
    assert restore(damaged) == 4 and capsys.readouterr().err == ""


def test_a_second_damaged_checkpoint_of_a_step_does_not_overwrite_the_first(damaged):
    restore(damaged)
    save(damaged, 4)
    zeroed(data_file(damaged / "checkpoints" / "4"))
    assert restore(damaged) == 2
    assert {"4.damaged", "4.damaged.1"} <= set(names(damaged))


def test_where_all_are_damaged_nothing_is_changed(workdir):
    for step in ("2", "4"):
        data_file(workdir / "checkpoints" / step).unlink()
    before = files(workdir)
    message = "no checkpoint in .* can be read: 4, 2 do not fit .*, or are damaged"
    with pytest.raises(checkpoint.NoReadableCheckpoint, match=message) as error:
        restore(workdir)
    assert "\n" not in str(error.value) and files(workdir) == before


def test_a_step_that_is_saved_already_is_left_as_it_is(workdir):
    before = {path: path.stat().st_mtime_ns for path in files(workdir)}
    save(workdir, 4)
    assert {path: path.stat().st_mtime_ns for path in files(workdir)} == before


# ------------------------------------------------------------ readers of a run


def test_a_reader_takes_the_newest_without_its_optimizer(workdir):
    state, position = checkpoint.read(workdir, like(state_of(0)))
    assert_equal(state.params, state_of(4).params)
    assert state.opt_state is None and position == {"next_index": 40}


def test_a_reader_takes_nothing_that_an_undone_update_would_bring_back(tmp_path):
    state = state_of(4)
    state = state._replace(before=Before(state.params, state.opt_state, jnp.bool_(True)))
    saved = checkpoint.Checkpoints(tmp_path, keep=1)
    saved.save(state, {})
    saved.close()
    read, _ = checkpoint.read(tmp_path, like(state))
    assert_equal(read.params, state.params)
    assert read.before is None


def test_frozen_weights_come_back_in_their_formats_wherever_the_folder_is(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    frozen = {form: quantize(w, form, (-2,), 4) for form in SCALED} | {"b": w.astype(jnp.bfloat16)}
    state = state_of(4)._replace(frozen=frozen)
    saved = checkpoint.Checkpoints(tmp_path / "run", keep=1)
    saved.save(state, {})
    saved.close()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    saved = checkpoint.Checkpoints(moved, keep=1)
    restored, _ = saved.restore(like(state))
    saved.close()
    assert_equal(restored, state)


def test_a_reader_falls_back_and_changes_nothing(workdir, capsys):
    zeroed(data_file(workdir / "checkpoints" / "4"))
    before = files(workdir)
    state, position = checkpoint.read(workdir, like(state_of(0)))
    assert_equal(state.params, state_of(2).params)
    assert position == {"next_index": 20} and files(workdir) == before
    assert "checkpoint 4" in capsys.readouterr().err


def test_a_reader_of_an_older_step_takes_one_before_it(workdir):
    state, _ = checkpoint.read(workdir, like(state_of(0)), before=4)
    assert int(state.step) == 2


def test_a_reader_without_a_checkpoint_says_so(workdir):
    with pytest.raises(checkpoint.NoReadableCheckpoint, match="holds no checkpoints"):
        checkpoint.read(workdir, like(state_of(0)), before=2)


# ------------------------------------------------------------ checksums


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool"]
)
def test_the_checksum_sees_every_bit(dtype):
    """Each bit of each element flipped, and each pair of elements exchanged."""
    dtype = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    is_bool = dtype.kind == "b"
    values = np.array([0, 1, 1, 0, 1], bool) if is_bool else np.arange(3, 8).astype(dtype)
    changed = [values]
    for i in range(len(values)):
        for bit in range(1 if is_bool else 8 * dtype.itemsize):
            raw = bytearray(values.tobytes())
            raw[i * dtype.itemsize + bit // 8] ^= 1 << bit % 8
            changed.append(np.frombuffer(bytes(raw), dtype))
        for j in range(i):
            other = values.copy()
            other[[i, j]] = other[[j, i]]
            if other.tobytes() != values.tobytes():
                changed.append(other)
    checksums = [checkpoint.checksums([x])["[0]"] for x in map(jnp.asarray, changed)]
    assert checksums.count(checksums[0]) == 1


def test_an_even_number_of_flipped_signs_is_seen():
    """A sum of products with odd numbers would miss it: 2^31 times an even number is 0 mod 2^32."""
    x = np.arange(1, 65, dtype=np.float32)
    y = np.where(np.arange(64) < 32, -x, x)
    assert checkpoint.checksums([jnp.asarray(x)]) != checkpoint.checksums([jnp.asarray(y)])


def test_the_checksum_does_not_depend_on_the_mesh():
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    expected = checkpoint.checksums([jnp.asarray(values)])
    for layout in (
        sharding.replicated(mesh),
        sharding.batch_sharding(mesh, 0),
        sharding.batch_sharding(mesh, 1),
    ):
        assert checkpoint.checksums([jax.device_put(values, layout)]) == expected


def test_offloaded_leaves_are_on_the_devices_one_at_a_time(monkeypatch):
    """All together would take the memory that offloading saves."""
    together = []
    checksums = checkpoint._checksums

    def counted(leaves):
        together.append(sum(x.sharding.memory_kind == sharding.HOST for x in leaves))
        return checksums(leaves)

    tree = {name: jnp.arange(size, dtype=jnp.float32) for name, size in (("a", 5), ("b", 7))}
    tree |= {"c": jnp.arange(9)}
    expected = checkpoint.checksums(tree)
    for name in ("a", "b"):
        tree[name] = jax.device_put(tree[name], sharding.on_host(tree[name].sharding))
    monkeypatch.setattr(checkpoint, "_checksums", counted)
    assert checkpoint.checksums(tree) == expected
    assert sum(together) == 2 and max(together) == 1


def test_checksums_are_those_of_the_formula():
    """Recomputed in NumPy, so that a checkpoint of today is intact for a later version."""
    values = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    bits = values.view(np.uint32).ravel() ^ np.arange(6, dtype=np.uint32) * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ bits >> np.uint32(shift)) * np.uint32(factor)
    expected = int(np.sum(bits ^ bits >> np.uint32(16), dtype=np.uint64)) % 2**32
    assert checkpoint.checksums({"x": jnp.asarray(values)}) == {"['x']": f"{expected:08x}"}
