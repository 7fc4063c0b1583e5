"""`python -m sapwood` is the command line."""

import sys

from sapwood.app.cli.main import main

sys.exit(main())
