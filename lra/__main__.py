"""`python -m lra`: the command line."""

from lra.cli import main

if __name__ == "__main__":
    main()
