"""``lco-lite`` and ``python -m lco_lite``."""

import os
import re
import signal
import sys
from types import FrameType
from typing import Any

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False) and sys.path[0] == os.getcwd():
    del sys.path[0]  # python -m: a json.py in the working folder is not the library


_exit = os._exit  # while the user's code runs it is another (user_code.py)


def main() -> None:
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # closed by who started us: the next file opened would take its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows speaks cp1252, which has no β
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from lco_lite import ranks
    from lco_lite.user_code import ends
    from lco_lite.visible import uncaught, visible

    sys.excepthook = uncaught
    try:
        ranks.join()
        from typer import Abort, BadParameter

        from lco_lite.cli import app

        usage_error: Any = BadParameter.__mro__[2]  # click's ClickException, or that of typer's own copy of click
        try:
            for word in sys.argv[1:]:
                if re.search("[\ud800-\udfff]", word):  # bytes that are no text, which no file of ours could name
                    raise BadParameter(f"{word!r:.200} is not in UTF-8")
            sys.exit(app(prog_name="lco-lite", standalone_mode=False))
        except (KeyError, ValueError) as e:
            if "_LCO_LITE_COMPLETE" not in os.environ:
                raise
            sys.exit(f"error: what a shell asks to complete (COMP_WORDS, COMP_CWORD): {type(e).__name__}: {e}")
        except usage_error as e:  # what was typed is in it
            e.message = visible(e.message)
            e.show()
            ranks.leave(well=False)
            sys.exit(e.exit_code)
        except Abort:
            _stopped()
    except KeyboardInterrupt:  # before a command has begun, which tells it itself
        _stopped()
    except SystemExit as end:
        ranks.leave(well=not end.code)
        ends(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. In an import native code may be on the stack, which takes no exception: the process ends as by a kill."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _stopped()
        frame = frame.f_back
    raise KeyboardInterrupt


def _stopped() -> None:
    os.write(2, b"stopped while loading; the same command goes on\n")
    _exit(130)


if __name__ == "__main__":
    main()
