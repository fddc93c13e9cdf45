"""Weights from elsewhere: reading them safely, and their names in our networks."""
