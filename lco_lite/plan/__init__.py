"""Does it fit, and what does it take (``lco-lite plan``)? From the recipe and its models' configs, without weights.

The phases' own code runs on tensors that have shapes and no numbers (torch's FakeTensorMode), on models cut down to a
few layers, while ``LiveBytes`` counts what is alive. Memory is linear in the layers: the line through two depths gives
that of the whole model. Batches are the longest that the recipe lets in. A card is stood in for by fake tensors of
another device, with the choices of the losses' code for CUDA; what its kernels take inside themselves is not seen.
"""

from lco_lite.plan.counting import LiveBytes
from lco_lite.plan.verdict import measured, peaks, plan, work

__all__ = ["LiveBytes", "measured", "peaks", "plan", "work"]
