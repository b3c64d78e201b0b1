"""Converts Hugging Face folders to run folders and back: ``megavlm convert`` under another name."""

import sys

from megavlm.cli import main

sys.argv.insert(1, "convert")
main()
