"""`python -m ptm VERB ...` is `ptm VERB ...`."""

from ptm.cli import main

if __name__ == "__main__":
    main()
