"""The table between tensors and parameters: splits, parts, names, dtypes."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels.checkpoints.huggingface import Checkpoint, write_weights
from jaxmodels.checkpoints.mapping import (
    OtherLayout,
    Row,
    check_names,
    common_dtype,
    flatten,
    load_arrays,
    to_tensors,
    unflatten,
)

STACKED = Row("layers.{}.q", ("layers", "q"), "(N H) D")
PLAIN = Row("embed", ("embed",), "V D")
SHAPES = {("layers", "q"): (3, 2, 4, 5), ("embed",): (7, 5)}


def stored(tmp_path, **changes) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    tensors = {f"layers.{n}.q": random.standard_normal((8, 5), np.float32) for n in range(3)}
    tensors["embed"] = random.standard_normal((7, 5), np.float32)
    tensors = {key: value for key, value in (tensors | changes).items() if value is not None}
    write_weights(tmp_path, tensors, max_shard_bytes=200)
    return Checkpoint(tmp_path), tensors


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_layers_are_stacked_and_dimensions_split(tmp_path, threads):
    checkpoint, tensors = stored(tmp_path)
    arrays = load_arrays(checkpoint, [STACKED, PLAIN], SHAPES, dtype=np.dtype(np.float32), threads=threads)
    for layer in range(3):
        np.testing.assert_array_equal(arrays["layers", "q"][layer], tensors[f"layers.{layer}.q"].reshape(2, 4, 5))
    np.testing.assert_array_equal(arrays["embed",], tensors["embed"])
    assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors.values())


def test_arrays_go_back_to_the_same_tensors(tmp_path):
    checkpoint, tensors = stored(tmp_path)
    arrays = load_arrays(checkpoint, [STACKED, PLAIN], SHAPES, dtype=np.dtype(np.float32))
    fetch = lambda array, index: np.asarray(array[index])  # noqa: E731
    lazy = to_tensors([STACKED, PLAIN], unflatten(arrays), None, fetch)
    assert lazy.keys() == tensors.keys()
    for name, tensor in lazy.items():
        assert tensor.shape == tensors[name].shape
        np.testing.assert_array_equal(tensor.read(), tensors[name])
    half = to_tensors([STACKED, PLAIN], unflatten(arrays), np.dtype(ml_dtypes.bfloat16), fetch)
    np.testing.assert_array_equal(half["embed"].read(), tensors["embed"].astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="differ in embed"):
        to_tensors([STACKED], unflatten(arrays), None, fetch)
    uneven = unflatten(arrays) | {"other": np.zeros((2, 8))}
    with pytest.raises(ValueError, match=r"disagree on the number of layers: \[2, 3\]"):
        to_tensors([STACKED, PLAIN, Row("layers.{}.x", ("other",), "D")], uneven, None, fetch)


def test_layers_without_a_tensor_are_zero_and_another_layout_is_read(tmp_path):
    turned = OtherLayout(lambda shape: (*shape[::-1], 1), lambda x: x[..., 0].T)
    row = Row("layers.{}.q", ("layers", "q"), "(N H) D", layers=(0, 2), other=turned)
    _, tensors = stored(tmp_path, **{"layers.1.q": None})
    own = tensors["layers.2.q"]
    write_weights(tmp_path, tensors | {"layers.2.q": own.T[..., None].copy()}, max_shard_bytes=200)
    assert row.names(3) == ["layers.0.q", "layers.2.q"] and PLAIN.names(3) == ["embed"]
    arrays = load_arrays(Checkpoint(tmp_path), [row, PLAIN], SHAPES, dtype=np.dtype(np.float32))
    expected = np.stack([tensors["layers.0.q"], np.zeros((8, 5)), own]).reshape(3, 2, 4, 5)
    np.testing.assert_array_equal(arrays["layers", "q"], expected)
    fetch = lambda array, index: np.asarray(array[index])  # noqa: E731
    lazy = to_tensors([row, PLAIN], unflatten(arrays), None, fetch)
    assert lazy.keys() == tensors.keys()
    np.testing.assert_array_equal(lazy["layers.2.q"].read(), own)
    write_weights(tmp_path, tensors | {"layers.2.q": own.T[None].copy()}, max_shard_bytes=200)
    with pytest.raises(ValueError, match=r"'layers.2.q' has shape \(1, 5, 8\); config.json implies \(8, 5\)"):
        load_arrays(Checkpoint(tmp_path), [row, PLAIN], SHAPES, dtype=np.dtype(np.float32))


def test_a_sharding_decides_what_is_read(tmp_path):
    """One device here: its part is everything; parts of several are tested in a process of their own."""
    checkpoint, tensors = stored(tmp_path)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    shardings = {path: NamedSharding(mesh, PartitionSpec("x")) for path in SHAPES}
    arrays = load_arrays(checkpoint, [STACKED, PLAIN], SHAPES, dtype=np.dtype(np.float32), shardings=shardings)
    assert all(arrays[path].sharding == shardings[path] for path in SHAPES)
    np.testing.assert_array_equal(arrays["embed",], tensors["embed"])


def test_problems_are_found_before_any_data_is_read(tmp_path):
    checkpoint, _ = stored(tmp_path, **{"layers.2.q": np.zeros((8, 6), np.float32)})
    with pytest.raises(ValueError, match=r"'layers\.2\.q' has shape \(8, 6\); config\.json implies \(8, 5\)"):
        load_arrays(checkpoint, [PLAIN, STACKED], SHAPES, dtype=np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"table and parameters differ in \[\('embed',\)\]"):
        load_arrays(checkpoint, [STACKED], SHAPES, dtype=np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"dims 'A B C' of 'embed' do not fit a parameter of shape \(7, 5\)"):
        load_arrays(checkpoint, [Row("embed", ("embed",), "A B C")], {("embed",): (7, 5)}, dtype=np.dtype(np.float32))
    assert checkpoint.bytes_read == 0


def test_names_are_checked_both_ways(tmp_path):
    checkpoint, tensors = stored(tmp_path)
    check_names(checkpoint, [*tensors])
    check_names(checkpoint, ["embed"], ignored=[r"layers\.\d\.q"])
    with pytest.raises(ValueError, match=r"lacks norm; has tensors that nothing uses: embed$"):
        check_names(checkpoint, ["norm", *(name for name in tensors if name != "embed")])
    with pytest.raises(ValueError, match=r"lacks x00, .*, x07 and 12 more$"):
        check_names(checkpoint, [*tensors, *(f"x{n:02d}" for n in range(20))])


def test_one_dtype_for_all(tmp_path):
    (tmp_path / "a").mkdir()
    checkpoint, tensors = stored(tmp_path / "a")
    assert common_dtype(checkpoint, [*tensors]) == np.float32
    (tmp_path / "b").mkdir()
    checkpoint, tensors = stored(tmp_path / "b", embed=np.zeros((7, 5), np.float16))
    with pytest.raises(ValueError, match=r"'embed' has dtype float16 but 'layers\.0\.q' has float32; pass dtype="):
        common_dtype(checkpoint, [*tensors])
    (tmp_path / "c").mkdir()
    checkpoint, _ = stored(tmp_path / "c", embed=np.zeros((7, 5), np.int8))
    with pytest.raises(ValueError, match=r"'embed' has dtype int8; weights must be one of"):
        common_dtype(checkpoint, ["embed"])


def test_nested_dicts_and_paths():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert unflatten(flatten(tree)) == tree
