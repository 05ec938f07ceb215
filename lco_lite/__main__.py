"""``lco-lite`` and ``python -m lco_lite``."""

import os
import sys
from typing import Any

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False) and sys.path[0] == os.getcwd():
    del sys.path[0]  # python -m: a json.py in the working folder is not the library


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows speaks cp1252, which has no β
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from lco_lite import ranks
    from lco_lite.visible import uncaught, visible

    sys.excepthook = uncaught
    ranks.join()
    from typer import BadParameter

    from lco_lite.cli import app

    usage_error: Any = BadParameter.__mro__[2]  # click's ClickException, or that of typer's own copy of click
    try:
        sys.exit(app(prog_name="lco-lite", standalone_mode=False))
    except usage_error as e:  # what was typed is in it
        e.message = visible(e.message)
        e.show()
        ranks.leave(well=False)
        sys.exit(e.exit_code)
    except SystemExit as end:
        ranks.leave(well=not end.code)
        raise


if __name__ == "__main__":
    main()
