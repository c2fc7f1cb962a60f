"""End-to-end runs of a patched Ollama: see `python -m tests.ollama_e2e --help`."""
