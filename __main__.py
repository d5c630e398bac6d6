"""`python -m hierbd3lm` is the command `hierbd3lm`."""

from .cli import main

if __name__ == "__main__":
    main()
