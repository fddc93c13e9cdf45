"""`python -m pmvis_cli`, the form that launchers such as `torchrun -m` need."""

from __future__ import annotations

import sys

from pmvis_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
