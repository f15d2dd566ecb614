"""The command `trialist`: one file per verb."""
