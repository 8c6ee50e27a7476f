"""`python -m entrenar` is `entrenar`."""

import sys

from entrenar.cli.main import main

sys.exit(main())
