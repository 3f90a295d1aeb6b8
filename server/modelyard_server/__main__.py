"""`python -m modelyard_server`: the same as the `modelyard` command."""

from __future__ import annotations

from modelyard_server.cli.main import main

if __name__ == "__main__":
    main()
