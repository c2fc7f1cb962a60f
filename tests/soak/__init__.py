"""A soak of a patched llama-server: see `python -m tests.soak --help`."""
