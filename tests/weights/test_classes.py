"""weights/classes.py: predictors of a cascade's stages are found as those of one head."""

import numpy as np
import pytest

from sephjax.weights import classes


@pytest.mark.parametrize("head", ["box_head", "box_head/stage0"])
def test_the_number_of_classes_is_read_off_the_logits(head):
    tensors = {f"{head}/dense/fc0/bias": np.zeros(9), f"{head}/logits/bias": np.zeros(81)}
    assert classes.count_of(tensors) == 80
    assert classes.count_of({"backbone/stem/conv/kernel": np.zeros(3)}) is None


@pytest.mark.parametrize("head", ["box_head", "box_head/stage2"])
def test_rows_of_a_predictor_are_chosen_with_background_last(head):
    path = f"{head}/logits/bias"
    assert classes.depends(path, (5,), 4)
    assert not classes.depends(f"{head}/deltas/bias", (4,), 4)  # class-agnostic
    assert classes.width(path, 80) == 81
    found = classes.choose(path, np.arange(5), [2, 0], 4)
    np.testing.assert_array_equal(found, [2, 0, 4])
