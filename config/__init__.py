"""Configuration files. They are loaded by path (`--config config/ucb.py:demo`), never imported."""
