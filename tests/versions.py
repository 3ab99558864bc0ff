"""What depends on the version of PyTorch."""

import pytest
import torch

words_of_213 = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="compares with texts and features that PyTorch 2.13 has"
)
