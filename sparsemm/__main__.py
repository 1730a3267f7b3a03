"""`python -m sparsemm`: the same as the `sparsemm` program."""

from sparsemm.cli import main

if __name__ == "__main__":
    main()
