"""What a run on a GPU alone calls, here with the CPU in the GPU's place: a first run must not fail on its own tests."""

from __future__ import annotations

import pytest
import torch

from test_gpu_model import check_layers

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


def test_layers_agree_with_a_copy() -> None:
    check_layers("cpu")
