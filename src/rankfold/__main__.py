"""``python -m rankfold``: the command line, as ``torchrun -m`` and others start it."""

from rankfold.cli import main

if __name__ == "__main__":
    main()
