"""Plain data shared by every layer. Imports the standard library only."""
