"""`ablab`, and `python -m ablab.experiments.cli`: the command line, and a Ctrl-C at any moment of it.

What takes time to import is imported in here: a second Ctrl-C, or one before anything has begun, is one line too.
"""

import signal
import sys


def start() -> None:
    try:
        from ablab.experiments.run.bytecode import keep_bytecode
        from ablab.experiments.run.garbage import collect_seldom

        keep_bytecode()
        collect_seldom()
        from ablab.experiments.cli.main import main

        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    start()
