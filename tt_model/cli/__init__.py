"""The command `twotower`: generate, info, train, convert.

Nothing heavy is imported before a command has been understood. Every failure is one line on stderr and an exit code:
2 for a command line that cannot be meant, 128 + n for signal n (130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP), 141
for a reader that went away, 1 for anything else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from ..stops import Raise, Stopped, handling
from . import convert, generate, info, train
from .common import Parser, describe, one_line_warnings, put
from .waiting import set_waiting

_EPILOG = """\
examples:
  echo "# enum Color: RED, GREEN, BLUE" | twotower generate
  echo "# csv reading: sensor str, level float" | twotower generate --watch
  twotower info
  twotower train ar --config config.json --data my_texts --out run/ar
  twotower convert nemotron-3-nano two-towers

Every command has its own --help with examples."""


def make_parser() -> Parser:
    """The whole command line; each command's module adds its own part."""
    from .. import __version__

    parser = Parser(
        "twotower",
        "Write text with TwoTower, a block-diffusion language model; look into its size; train it.",
        _EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"twotower {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for part in (generate, info, train, convert):
        part.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. `arguments`: as in sys.argv[1:], which is the default.

    TWOTOWER_DEBUG=1 in the environment lets exceptions through, with their traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    debug = os.environ.get("TWOTOWER_DEBUG") == "1"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not lose the text
    try:
        with one_line_warnings(), handling(Raise()):
            code = _run(arguments)
            put("")  # what print has left
        return code
    except BrokenPipeError:
        _drop_output()
        code, message = 141, "standard output was closed before everything was written"
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        code, message = 128 + number, str(error) or "interrupted"
    except Exception as error:
        if debug:
            raise
        code, message = 1, describe(error)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    with suppress(OSError):  # a terminal that has gone cannot be told
        print(f"twotower: error: {message}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Let the interpreter's own last flush succeed."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options, unknown = make_parser().parse_known_args(arguments)
        if unknown:  # here rather than in parse_args, so that the right --help is pointed at
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as stop:  # --help, --version, or a usage error that has been reported
        return int(stop.code or 0)
    set_waiting()
    options.run(options)
    return 0
