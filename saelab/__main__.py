"""``python -m saelab`` is the ``saelab`` command."""

from saelab.cli import main

if __name__ == "__main__":
    main()
