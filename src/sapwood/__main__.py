"""`python -m sapwood` is the command line, and so is the command `sapwood`."""

import sys

from sapwood.base.stopping import EarlyExit


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        # Before the imports, which take long enough for a supervisor to change its mind.
        EarlyExit().install()
    from sapwood.app.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
