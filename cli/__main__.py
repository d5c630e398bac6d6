"""`python -m hierbd3lm.cli`."""

from . import main

if __name__ == "__main__":
    main()
