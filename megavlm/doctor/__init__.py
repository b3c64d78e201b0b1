"""What this machine has for speed, whether it fits together, and what a recipe will run on."""
