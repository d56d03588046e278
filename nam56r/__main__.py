"""`python -m nam56r`, and `torchrun -m nam56r` for several processes."""

from nam56r.cli import main

if __name__ == "__main__":
    main()
