import subprocess
import sys

import pytest
import torch

from lco_lite.metrics import peak_mib

FRESH = """
from lco_lite.metrics import peak_mib
import sys
before = peak_mib()
block = bytearray(200 * 2**20)
print(before, peak_mib(), "torch" in sys.modules)
"""


def test_the_peak_grows_with_what_the_process_holds_and_needs_no_torch():
    out = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, timeout=60).stdout
    before, after, torch_there = out.split()
    assert 190 < float(after) - float(before) < 230
    assert 1 < float(before) < 200
    assert torch_there == "False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_peak_is_that_of_the_gpu():
    torch.cuda.reset_peak_memory_stats()
    block = torch.empty(100 * 2**20, dtype=torch.uint8, device="cuda")
    assert peak_mib() >= 100
    del block
    assert peak_mib() >= 100
