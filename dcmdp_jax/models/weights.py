"""Weights in and out of a Hugging Face folder: safetensors only, a slice of a shard at a time.

`parameter_table` has the names of the stored tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dcmdp_jax.files import atomic_folder, read_json_object, share_as_folder
from dcmdp_jax.models import decoder, hf_config
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import Quantized

FLOATS = ("F32", "BF16", "F16", "F64")
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
ROWS = 64  # of the embedding that `check` compares with a stored copy

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor. The parameter is `stored.reshape(view).transpose(order)`.

    `view` splits the stored axis `heads` into heads and head size (None: there is no such axis).
    `copy` names a tensor that must equal this one if it is stored.
    """

    name: str
    view: tuple[int, ...]
    order: tuple[int, ...]
    heads: int | None = None
    copy: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as stored."""
        if self.heads is None:
            return self.view
        merged = self.view[self.heads] * self.view[self.heads + 1]
        return (*self.view[: self.heads], merged, *self.view[self.heads + 2 :])

    def read(self, stored: Any, index: Index) -> np.ndarray:
        """Returns the parameter's block `index`, reading only the stored rows and columns (of all
        head features) that it spans.
        """
        wanted = [index[self.order.index(axis)] for axis in range(len(self.view))]
        if self.heads is None:
            return stored[tuple(wanted)].transpose(self.order)
        a = self.heads
        size = self.view[self.heads + 1]
        within = wanted[a + 1]
        merged = slice(wanted[a].start * size, wanted[a].stop * size)
        block = stored[(*wanted[:a], merged, *wanted[a + 2 :])]
        block = block.reshape(*block.shape[:a], -1, size, *block.shape[a + 1 :])
        return block[(*[slice(None)] * (a + 1), within)].transpose(self.order)

    def stored(self, param: np.ndarray) -> np.ndarray:
        """Returns the tensor as it is stored, contiguous as safetensors needs it."""
        return np.ascontiguousarray(param.transpose(np.argsort(self.order)).reshape(self.shape))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter, and the stored tensor at each index of its leading axes: (), (layer,) or
    (layer, expert).
    """

    tensors: dict[tuple[int, ...], Tensor]

    def read(self, files: dict[str, Any], index: Index, dtype) -> np.ndarray:
        """Returns block `index` of the parameter.

        Raises ValueError on NaN, infinity, or a copy that differs.
        """
        rank = len(next(iter(self.tensors)))
        leading = index[:rank]
        rest = index[rank:]
        out = np.empty([s.stop - s.start for s in index], dtype)
        for number in itertools.product(*(range(s.start, s.stop) for s in leading)):
            tensor = self.tensors[number]
            at = tuple(n - s.start for n, s in zip(number, leading, strict=True))
            block = tensor.read(files[tensor.name].get_slice(tensor.name), rest)
            with np.errstate(over="ignore"):  # refused below
                out[at] = block
            if not _all_finite(out[at]):
                raise ValueError(
                    f"tensor {tensor.name} holds NaN, infinity, or what {out.dtype} cannot hold"
                )
            if tensor.copy in files and not _equal(
                block, tensor.read(files[tensor.copy].get_slice(tensor.copy), rest)
            ):
                raise ValueError(
                    f"tensor {tensor.copy} is not {tensor.name}, as tie_word_embeddings says in "
                    "config.json; set it to false there to use the head that is stored, or take "
                    "the tensor out"
                )
        return out


def _all_finite(block: np.ndarray) -> bool:
    """Returns True if no number is NaN or infinite; takes about half a second per GiB."""
    if block.dtype == jnp.bfloat16:  # by the exponent's bits: three times as fast as isfinite
        return bool((block.view(np.uint16) & 0x7F80).max() < 0x7F80)
    return bool(np.isfinite(block).all())


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns True if two blocks have the same values, whatever their dtypes."""
    if a.dtype != b.dtype:
        a = a.astype(np.float64)
        b = b.astype(np.float64)
    return np.array_equal(a, b)


# Names and layouts of the stored tensors


def _attention(c: ModelConfig) -> dict:
    d = c.hidden_size
    h = c.head_dim
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    tree = {
        f"{x}_proj": Tensor(f"self_attn.{x}_proj.weight", (n, h, d), (2, 0, 1), heads=0)
        for x, n in heads.items()
    }
    tree["o_proj"] = Tensor("self_attn.o_proj.weight", (d, c.num_heads, h), (1, 2, 0), heads=1)
    if c.qk_norm:
        tree |= {
            name: {"scale": Tensor(f"self_attn.{name}.weight", (h,), (0,))}
            for name in ("q_norm", "k_norm")
        }
    if c.qkv_bias:
        tree |= {
            f"{x}_bias": Tensor(f"self_attn.{x}_proj.bias", (n, h), (0, 1), heads=0)
            for x, n in heads.items()
        }
    if c.o_bias:
        tree["o_bias"] = Tensor("self_attn.o_proj.bias", (d,), (0,))
    return tree


def _feed_forward(prefix: str, d: int, f: int) -> dict:
    wide = {
        name: Tensor(f"{prefix}.{name}.weight", (f, d), (1, 0)) for name in ("gate_proj", "up_proj")
    }
    return wide | {"down_proj": Tensor(f"{prefix}.down_proj.weight", (d, f), (1, 0))}


def _layer(c: ModelConfig, sparse: bool) -> dict:
    d = c.hidden_size
    tree = {
        "input_norm": {"scale": Tensor("input_layernorm.weight", (d,), (0,))},
        "attention": _attention(c),
        "post_attention_norm": {"scale": Tensor("post_attention_layernorm.weight", (d,), (0,))},
    }
    if not sparse:
        return tree | {"mlp": _feed_forward("mlp", d, c.intermediate_size)}
    router = {"router": Tensor("mlp.gate.weight", (c.num_experts, d), (1, 0))}
    return tree | {"moe": router | _feed_forward("mlp.experts.{expert}", d, c.expert_size)}


def parameter_table(config: ModelConfig) -> dict:
    """Returns `decoder.init`'s tree with a `Leaf` instead of each array."""
    v = config.vocab_size
    d = config.hidden_size
    # some writers store a tied head a second time
    copy = HEAD if config.tie_word_embeddings else None
    tree = {
        "embed": Leaf({(): Tensor("model.embed_tokens.weight", (v, d), (0, 1), copy=copy)}),
        "final_norm": Leaf({(): Tensor("model.norm.weight", (d,), (0,))}),
        "stacks": [],
    }
    if not config.tie_word_embeddings:
        tree["head"] = Leaf({(): Tensor(HEAD, (v, d), (1, 0))})
    first_layer = 0
    for sparse, count in decoder.stacks(config):

        def stack(tensor: Tensor, first_layer=first_layer, count=count) -> Leaf:
            name = "model.layers.{layer}." + tensor.name
            experts = [(e,) for e in range(config.num_experts)] if "{expert}" in name else [()]
            return Leaf(
                {
                    (i, *e): dataclasses.replace(
                        tensor, name=name.format(layer=first_layer + i, expert=e[0] if e else 0)
                    )
                    for i in range(count)
                    for e in experts
                }
            )

        tree["stacks"].append(jax.tree.map(stack, _layer(config, sparse)))
        first_layer += count
    return tree


# In


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Returns the config of the model in `folder`; see `hf_config.read`."""
    return hf_config.read(folder)


def check(folder: str | pathlib.Path) -> None:
    """Raises ValueError for most of what `load` refuses; reads headers and rows of a tied head.

    Only `load` detects NaN, infinity, and differences in the other rows of a tied head.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    files = _open(folder)
    tree = check_stored(folder, files, config)
    with naming(folder):
        tree["embed"].read(
            files,
            (slice(0, min(ROWS, config.vocab_size)), slice(0, config.hidden_size)),
            np.float32,
        )


def load(
    folder: str | pathlib.Path,
    dtype=jnp.float32,
    *,
    shardings: Any = None,
    convert: Callable[[tuple, jax.Array], Any] = lambda path, w: w,
) -> tuple[ModelConfig, dict]:
    """Returns the config and the parameters of a Hugging Face folder.

    `shardings` is a tree with the structure of `decoder.init`'s: only the slices for this host's
    devices are read. None puts everything on the default device. Weights are cast to `dtype`, and
    each is replaced by `convert(path, weight)` before the next is read.

    Raises ValueError, before it reads any weight, for a missing folder, config.json, shard or
    tensor, an architecture or setting that is not supported, a tensor of the wrong shape or without
    a use, and a damaged shard; and, as it reads, for weights that are not finite in `dtype` and a
    tied head that differs from the embedding.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    files = _open(folder)
    table = check_stored(folder, files, config)
    paths, treedef = jax.tree_util.tree_flatten_with_path(table)
    shapes = treedef.flatten_up_to(
        jax.eval_shape(lambda: decoder.init(jax.random.key(0), config, dtype))
    )
    shardings = [None] * len(paths) if shardings is None else treedef.flatten_up_to(shardings)
    with naming(folder):
        arrays = [
            convert(path, _read_array(leaf, shape, sharding, files))
            for (path, leaf), shape, sharding in zip(paths, shapes, shardings, strict=True)
        ]
    return config, treedef.unflatten(arrays)


@contextlib.contextmanager
def naming(folder: pathlib.Path) -> Iterator[None]:
    """Puts the folder's or file's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _read_array(
    leaf: Leaf, shape: jax.ShapeDtypeStruct, sharding: Any, files: dict[str, Any]
) -> jax.Array:
    """Returns one parameter, on its devices."""
    blocks = {}  # replicas of one slice share one read

    def block(index: Index) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape.shape, strict=True))
        if bounds not in blocks:
            blocks[bounds] = leaf.read(files, tuple(slice(*b) for b in bounds), shape.dtype)
        return blocks[bounds]

    if sharding is None:
        return jnp.asarray(block((slice(None),) * len(shape.shape)))
    return jax.make_array_from_callback(shape.shape, sharding, block)


def _open(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the open file of each stored tensor, by the tensor's name."""
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        if not (folder / INDEX).is_file():
            raise ValueError(_no_weights(folder))
        names = _shard_names(folder / INDEX)
    files = {}
    shards = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / INDEX} names the shard {name}, which is missing; copy or download it "
                "again"
            )
        try:
            file = safetensors.safe_open(folder / name, framework="np")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{folder / name} is damaged or cut short ({error}); copy or download it again"
            ) from None
        for tensor in file.keys():  # noqa: SIM118 (no dict)
            if tensor in files:
                raise ValueError(
                    f"{folder}: tensor {tensor} is in {shards[tensor]} and in {name}; keep one of "
                    "the two"
                )
            files[tensor] = file
            shards[tensor] = name
    return files


def _shard_names(path: pathlib.Path) -> list[str]:
    """Returns the names of the files in an index.

    Raises ValueError for a file outside the folder, and for an index of another form.
    """
    where = read_json_object(path).get("weight_map")
    names = where.values() if isinstance(where, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{path} is not an index of safetensors: it needs weight_map, from tensors to "
            "file names; copy or download it again"
        )
    for name in names:
        if not re.fullmatch(r"[^/\\\0]{1,240}\.safetensors", name):
            raise ValueError(
                f"{path} names the shard {name[:240]!r}, which is no .safetensors file of its "
                "own folder; copy the model from a source that you trust"
            )
    return sorted(set(names))


def _no_weights(folder: pathlib.Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{folder} holds pickled weights, which can run code and are not read; "
            "save the model again with transformers' save_pretrained, which writes safetensors"
        )
    return f"{folder} has neither model.safetensors nor {INDEX}"


def check_stored(folder: pathlib.Path, files: dict[str, Any], config: ModelConfig) -> dict:
    """Returns `parameter_table`.

    Args:
        folder: named in messages.
        files: what holds each stored tensor, by the tensor's name.

    Raises ValueError unless names, shapes and dtypes are those of the table.
    """
    # counted before any is named: a damaged config.json may call for billions
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_layers))
    if config.num_layers + sparse * config.num_experts > len(files):
        raise ValueError(
            f"{folder} has {len(files)} tensors, too few for num_hidden_layers={config.num_layers} "
            f"of its config.json{f' with num_experts={config.num_experts}' if sparse else ''}"
        )
    tree = parameter_table(config)
    tensors = {
        tensor.name: tensor for leaf in jax.tree.leaves(tree) for tensor in leaf.tensors.values()
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if config.tie_word_embeddings and HEAD in files:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for name, shape in shapes.items():
        if name not in files:
            raise ValueError(f"{folder} has no tensor {name}, which its config.json calls for")
        stored = files[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            got = tuple(stored.get_shape())
            raise ValueError(
                f"{folder}: tensor {name} has shape {got}; its config.json calls for {shape}"
            )
        if stored.get_dtype() not in FLOATS:
            raise ValueError(
                f"{folder}: tensor {name} is {stored.get_dtype()}; only {', '.join(FLOATS)} are "
                "read"
            )
    extra = files.keys() - shapes.keys()
    if extra:
        raise ValueError(
            f"{folder} has a tensor {min(extra)}, which its config.json has no place for"
        )
    return tree


# Out


def save(
    folder: str | pathlib.Path,
    config: ModelConfig,
    params: dict,
    *,
    max_shard_bytes: int = 5_000_000_000,
    token_ids: dict[str, Any] | None = None,
) -> None:
    """Writes `params` (the tree of `decoder.init`, of JAX or NumPy arrays) as a Hugging Face folder
    that `load` and transformers read.

    `token_ids` are those that config.json names, as `tokenizer.special_token_ids` returns them. The
    folder gets config.json, safetensors of at most `max_shard_bytes` each (or one tensor, if
    larger) and their index; it appears complete or not at all.

    Raises ValueError if it exists and is not empty, for parameters of another form or shape, and
    for parameters on other hosts.
    """
    folder = pathlib.Path(folder).absolute()
    check_new(folder)
    pairs = _pair(config, params)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as building:
        _write(building, pairs, max_shard_bytes)
        hf_config.write(
            building / "config.json", config, str(params["embed"].dtype), token_ids or {}
        )


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError if `folder` exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give a new one")


def _pair(config: ModelConfig, params: dict) -> list[tuple[Leaf, jax.Array]]:
    """Returns each leaf with its array, checked."""
    arrays = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    if any(isinstance(array, Quantized) for array in arrays):
        raise ValueError(
            "save: the parameters are quantized; save the trainer's, in float32 or bfloat16"
        )
    want = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    shapes = jax.tree.map(jnp.shape, params)
    if shapes != jax.tree.map(lambda x: x.shape, want):
        raise ValueError(
            "save: the parameters do not fit this model config; pass the tree of init or load"
        )
    if any(isinstance(array, jax.Array) and not array.is_fully_addressable for array in arrays):
        raise ValueError("save: other hosts hold part of the parameters; gather them first")
    return list(zip(jax.tree.leaves(parameter_table(config)), arrays, strict=True))


def _write(folder: pathlib.Path, pairs: list[tuple[Leaf, jax.Array]], max_shard_bytes: int) -> None:
    """Writes the shards and their index; one shard is in host memory at a time."""
    shards = list(_shards(pairs, max_shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        tensors = {
            tensor.name: tensor.stored(np.asarray(array[index])) for tensor, array, index in shard
        }
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        share_as_folder(folder / name)
    if len(shards) > 1:
        total = sum(array.nbytes for _, array in pairs)
        where = {
            tensor.name: name
            for name, shard in zip(names, shards, strict=True)
            for tensor, _, _ in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(pairs: list[tuple[Leaf, jax.Array]], max_shard_bytes: int) -> Iterator[list[tuple]]:
    """Yields the (tensor, array, index of the tensor in the array) of each shard."""
    shard = []
    size = 0
    for leaf, array in pairs:
        for index, tensor in leaf.tensors.items():
            nbytes = array.nbytes // len(leaf.tensors)
            if shard and size + nbytes > max_shard_bytes:
                yield shard
                shard = []
                size = 0
            shard.append((tensor, array, index))
            size += nbytes
    yield shard
