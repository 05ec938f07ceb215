"""``python -m tests.faults``: what is promised of a run, under faults of every kind. See docs/reliability.md.

A line a kind, with how many cases of it were tried and how they went; the command that tries a failed one again; exit
status 1 where one failed. Without --full a few cases of each kind, as the tests run them; malformed inputs all.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# cases of each kind in the short form, and the share of the time that it has in the full one
FEW = {"kills": 3, "faults": 5, "signals": 2, "disk-full": 2, "damage": 6, "mistyped": 2, "non-finite": 3}
FEW |= {"user-code": 5}
SHARES = {"kills": 4, "faults": 7, "signals": 3, "disk-full": 2, "damage": 6, "mistyped": 4, "non-finite": 2}
SHARES |= {"user-code": 4}


def warm() -> None:
    """Everything that a command imports, and nothing computed."""
    import datasets  # noqa: F401
    import pandas  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import lco_lite.cli
    import lco_lite.evaluation.evaluate
    import lco_lite.train.pipeline  # noqa: F401
    from lco_lite.models.loading import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")


def main() -> int:
    from tests.faults.kinds import KINDS
    from tests.faults.runs import Failed, Workshop, temporary_folder

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="as many cases as there is time for")
    parser.add_argument("--minutes", type=float, default=20.0, help="the time of --full (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--case", help="this one case of the kind")
    parser.add_argument("--verbose", action="store_true", help="a line a case")
    asked = parser.parse_args()
    chosen = asked.only or list(KINDS)
    if asked.case and len(chosen) != 1:
        parser.error("--case: name its kind by --only")
    warm()
    failures, budget = (
        0,
        asked.minutes * 60 / sum(SHARES[k] for k in chosen if k in SHARES) if chosen != ["malformed"] else 0,
    )
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        shop = Workshop(Path(folder), Path(folder), {}) if chosen == ["malformed"] else Workshop.make(Path(folder))
        for kind in chosen:
            cases, attempt = KINDS[kind]
            began, found, failed = time.monotonic(), Counter[str](), list[tuple[str, str]]()
            texts = [asked.case] if asked.case else cases(shop, Random(f"{kind} {asked.seed}"))
            if not asked.full and not asked.case:
                texts = itertools.islice(texts, FEW.get(kind))
            for text in texts:
                try:
                    word = attempt(shop, text)
                except Failed as e:
                    word = "FAILED"
                    failed.append((text, str(e)))
                except Exception:
                    word = "FAILED"
                    failed.append((text, traceback.format_exc()))
                found[word] += 1
                if asked.verbose:
                    print(f"  {kind} {text}: {word}", flush=True)
                if (
                    asked.full
                    and not asked.case
                    and kind in SHARES
                    and time.monotonic() - began > budget * SHARES[kind]
                ):
                    break
            told = ", ".join(f"{n} {word}" for word, n in found.most_common())
            print(f"{kind:10} {sum(found.values())} cases in {time.monotonic() - began:.0f} s: {told}", flush=True)
            for text, why in failed:
                again = f"python -m tests.faults --only {kind} --case {text!r}"
                print(f"  FAILED: {again}\n    " + why.replace("\n", "\n    "), flush=True)
            failures += len(failed)
    print(
        f"seed {asked.seed}, Python {platform.python_version()}, {platform.system()}: {failures} failures", flush=True
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
