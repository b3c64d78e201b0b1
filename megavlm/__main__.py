"""``python -m megavlm`` and ``torchrun -m megavlm``: the same as the ``megavlm`` command."""

from megavlm.cli import main

if __name__ == "__main__":
    main()
