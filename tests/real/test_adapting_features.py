"""Frozen features on photographs: where the network has seen their like, they gain."""

import numpy as np
import pytest

from bigmodel_nb.adapting.features import EFFICIENTNET
from bigmodel_nb.headless.run import run
from bigmodel_nb.models.pretrained import find


@pytest.mark.skipif(
    find(EFFICIENTNET) is None, reason="needs `bigmodel fetch tf_efficientnet_lite0`"
)
def test_ten_photographs_a_class_are_enough_for_frozen_features(real_data, tmp_path):
    photographs = real_data / "cifar10_subset" / "train"
    done = run("adapting/features", out=tmp_path, images=photographs, image_size=96)
    found = done.metrics["accuracy_pictures"]
    assert len(found["small net"]) == 5 and np.mean(found["frozen features"]) > 0.45
    assert done.metrics["gain_over_small_net"]["low"] > 0.1
    assert done.metrics["verdict"].startswith("Frozen features gain over a small net")
