"""`python -m rawmerge`."""

from rawmerge.cli import main

if __name__ == "__main__":
    main()
