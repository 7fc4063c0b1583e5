"""`python -m sapwood.launch_server` is `sapwood serve`, for scripts that start SGLang's server."""

import sys

from sapwood.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    sys.exit(main())
