"""`python -m kvpatch`."""

from __future__ import annotations

from kvpatch.cli import main

if __name__ == "__main__":
    main()
