"""`python -m llmreg` is the console script."""

from .cli import main

main()
