import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.ops import anchors as anchor_ops

RATIOS = (0.5, 1.0, 2.0)


def detectron2_cells(size, ratios=RATIOS):
    return anchor_ops.cell_anchors(
        size=size, ratios=ratios, ratio_is="height_over_width", rounded=False
    )


def test_anchors_agree_with_detectron2s_published_boxes():
    # detectron2 tests/modeling/test_anchor_generator.py: sizes 32 and 64, ratios .25, 1, 4,
    # stride 4 on a 1×2 map.
    cells = detectron2_cells((32, 64), (0.25, 1, 4))
    anchors = anchor_ops.grid_anchors(cells, shape=(1, 2), stride=(4, 4), offset=0.0)
    expected = [
        [-32.0, -8.0, 32.0, 8.0],
        [-16.0, -16.0, 16.0, 16.0],
        [-8.0, -32.0, 8.0, 32.0],
        [-64.0, -16.0, 64.0, 16.0],
        [-32.0, -32.0, 32.0, 32.0],
        [-16.0, -64.0, 16.0, 64.0],
        [-28.0, -8.0, 36.0, 8.0],
        [-12.0, -16.0, 20.0, 16.0],
        [-4.0, -32.0, 12.0, 32.0],
        [-60.0, -16.0, 68.0, 16.0],
        [-28.0, -32.0, 36.0, 32.0],
        [-12.0, -64.0, 20.0, 64.0],
    ]
    np.testing.assert_allclose(anchors, expected, atol=1e-5)


def test_anchors_agree_with_the_series_check_values():
    # Image 576×768, P3 72×96, size 64, cell (10, 20), in relative (y1, x1, y2, x2).
    cells = anchor_ops.cell_anchors(
        size=64, ratios=RATIOS, ratio_is="width_over_height", rounded=False
    )
    (anchors,) = anchor_ops.pyramid_anchors(
        canvas=(576, 768), shapes=((72, 96),), cells=(cells,), strides="feature", offset=0.5
    )
    cell = np.asarray(anchors).reshape(72, 96, 3, 4)[10, 20]
    relative = cell[:, [1, 0, 3, 2]] / np.array([576, 768, 576, 768])
    expected = [
        [0.067266, 0.184079, 0.224401, 0.243004],
        [0.090278, 0.171875, 0.201389, 0.255208],
        [0.106550, 0.154616, 0.185117, 0.272467],
    ]
    np.testing.assert_allclose(relative, expected, atol=1e-6)


def test_the_two_meanings_of_a_ratio_are_transposed():
    tall = detectron2_cells(32, (2.0,))[0]
    wide = anchor_ops.cell_anchors(
        size=32, ratios=(2.0,), ratio_is="width_over_height", rounded=False
    )[0]
    np.testing.assert_allclose(tall[[1, 0, 3, 2]], wide, rtol=1e-6)
    assert tall[3] > tall[2]
    np.testing.assert_allclose((tall[2] - tall[0]) * (tall[3] - tall[1]), 1024, rtol=1e-6)


def test_the_grid_agrees_with_a_loop():
    cells = detectron2_cells((8, 16), (0.5, 1.0))
    expected = [
        cell + np.array([x * 5.0 + 2.5, y * 3.0 + 1.5, x * 5.0 + 2.5, y * 3.0 + 1.5])
        for y in range(3)
        for x in range(4)
        for cell in cells
    ]
    ours = anchor_ops.grid_anchors(cells, shape=(3, 4), stride=(3.0, 5.0), offset=0.5)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_stride_by_the_feature_map_differs_from_the_nominal_one():
    cells = (detectron2_cells(32),)
    by_map, nominal = (
        anchor_ops.pyramid_anchors(
            canvas=(100, 96), shapes=((13, 12),), cells=cells, strides=strides, offset=0.5
        )
        for strides in ("feature", (8,))
    )
    np.testing.assert_allclose(by_map[0][0, 1] + 0.5 * 32 * 2**-0.5, 50 / 13, atol=1e-5)
    np.testing.assert_allclose(nominal[0][0, 1] + 0.5 * 32 * 2**-0.5, 4.0, atol=1e-5)


def test_levels_of_different_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        anchor_ops.pyramid_anchors(
            canvas=(64, 64),
            shapes=((8, 8), (4, 4)),
            cells=(detectron2_cells(32),),
            strides=(8, 16),
            offset=0,
        )


def test_no_large_constant_enters_the_program():
    def program():
        return anchor_ops.grid_anchors(
            detectron2_cells(32), shape=(200, 200), stride=(4, 4), offset=0
        )

    assert len(str(jax.jit(program).lower().compile().as_text())) < 20_000
    assert jax.eval_shape(program).shape == (120_000, 4)


@pytest.mark.torch
def test_anchors_agree_with_torchvision():
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
    images = pytest.importorskip("torchvision.models.detection.image_list")
    sizes = ((32, 48), (64, 80), (128, 31))
    shapes = ((16, 24), (8, 12), (4, 6))
    generator = utils.AnchorGenerator(sizes, (RATIOS,) * 3)
    features = [torch.zeros(1, 8, *shape) for shape in shapes]
    (theirs,) = generator(images.ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)]), features)
    cells = tuple(
        anchor_ops.cell_anchors(
            size=size, ratios=RATIOS, ratio_is="height_over_width", rounded=True
        )
        for size in sizes
    )
    ours = anchor_ops.pyramid_anchors(
        canvas=(128, 192), shapes=shapes, cells=cells, strides=(8.0, 16.0, 32.0), offset=0.0
    )
    np.testing.assert_array_equal(jnp.concatenate(ours), theirs.numpy())
