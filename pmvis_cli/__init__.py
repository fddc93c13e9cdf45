"""The door: Typer commands; no tensor is touched here."""
