"""``python -m csmask`` is the ``csmask`` command."""

from .cli import main

main()
