"""Imported before torch, which takes seconds: from then on, Ctrl-C ends a script in one line, not in a traceback, and
a closed stderr, which progress bars would fail at, is replaced."""
import os
import sys


def print_error(kind: type, *error):
    if kind is KeyboardInterrupt:
        print(f"\n{os.path.basename(sys.argv[0])}: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, *error)


sys.excepthook = print_error
sys.stderr = sys.stderr or open(os.devnull, "w")
