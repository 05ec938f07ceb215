"""Peak memory of this process, in MiB."""

from __future__ import annotations

import sys


def peak_mib() -> float:
    """Most memory allocated on the GPU since the last reset; without one, the largest resident size of the process."""
    torch = sys.modules.get("torch")  # not imported: then nothing is on a GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return _peak_resident_mib()


if sys.platform == "win32":

    def _peak_resident_mib() -> float:
        import psutil  # comes with accelerate

        return float(psutil.Process().memory_info().peak_wset) / 2**20
elif sys.platform == "linux":

    def _peak_resident_mib() -> float:
        # not getrusage: its peak is passed on from the parent process, however small the child
        with open("/proc/self/status", encoding="ascii") as status:
            return next(float(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
else:

    def _peak_resident_mib() -> float:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on other systems
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
