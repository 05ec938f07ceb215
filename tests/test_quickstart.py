"""The shipped quickstart learns: what the README promises, on problems that the model never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lco_lite.command import command
from lco_lite.train.pipeline import run_all

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_quickstart_gains_a_quarter_over_its_warm_up(tmp_path):
    with command(str(ROOT / "recipes/quickstart.yaml"), tmp_path, None, [], {}, quiet=True) as ctx:
        run_all(ctx, fresh=False)
    scores = {
        stage: json.loads(ctx.run.eval_path("arithmetic", stage).read_text()) for stage in ("sft", "rm", "rl-kld")
    }
    assert scores["rl-kld"]["n"] == 500 and scores["rl-kld"]["seeds"] == 4
    assert scores["sft"]["mean"] > 0.1, "something has been learnt before RL"
    assert scores["rl-kld"]["mean"] >= scores["sft"]["mean"] + 0.25
