"""How the tiny model is trained; run by `scripts/train_tiny.py`, never imported by the package."""
