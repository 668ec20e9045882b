"""How a script ends where something goes wrong: in one line, not in a traceback. Imported before torch, which takes
seconds: from then on Ctrl-C does that, too, a closed stderr, which progress bars would fail at, is replaced, and what
stdout cannot encode is escaped."""
import contextlib
import os
import sys


def print_error(kind: type, *error):
    if kind is KeyboardInterrupt:
        print(f"\n{os.path.basename(sys.argv[0])}: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, *error)


sys.excepthook = print_error
sys.stderr = sys.stderr or open(os.devnull, "w")
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without é is no reason to lose hours of measuring


@contextlib.contextmanager
def one_line_errors(*kinds: type, note: str = "", full: str = "", quiet: bool = False):
    """`with one_line_errors(OSError):` errors of these kinds end the script, with `note` behind them. full: what to try
    where a GPU's memory is full; without it, that error is left to the `with` around this one. quiet: nothing is said
    of a ValueError, which another process reports."""
    try:
        yield
    except Exception as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, a RuntimeError
        if not (full if out_of_memory else isinstance(error, kinds)):
            raise
        message = f"the GPU's memory is full: {full}" if out_of_memory else error
        silent = quiet and isinstance(error, ValueError)
        sys.exit(1 if silent else f"{os.path.basename(sys.argv[0])}: {message}{note}")
