"""Libraries that speak while they load: their progress bars and harmless warnings are not what a run says."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """No progress bars of transformers and datasets; no warnings that a user can do nothing about. Errors stay."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*kernels.*", module="bitsandbytes.*")
