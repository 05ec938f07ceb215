"""What of others' text reaches a terminal or a log: nothing that steers it, nothing that hides or turns around what is
read there. Recipes, data, exceptions and models are others."""

import re
import sys
import traceback
from types import TracebackType

# C0 but tab and line end, DEL, C1; marks of direction, overrides and isolates; what has no width; line separators;
# lone surrogates; tags
CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f"
)
_CONTROL = re.compile(f"[{CONTROLS}\ud800-\udfff]")


def visible(text: str, lines: bool = True, keep: str = "", form: str = "") -> str:
    """``text`` with such characters written out: ``\\x1b``, ``\\u202e``, or by ``form`` with their number in it. Tabs
    stay, what is to be kept, and line ends where ``lines``."""

    def written(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        return (form or ("\\x{:02x}" if code < 0x100 else "\\u{:04x}" if code < 0x10000 else "\\U{:08x}")).format(code)

    text = _CONTROL.sub(written, text)
    return text if lines else text.replace("\n", "\\n")


def uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """A ``sys.excepthook``: the traceback, on the stderr that the process began with."""
    print(visible("".join(traceback.format_exception(kind, error, where))), end="", file=sys.__stderr__)
