"""`python -m trialist` is `trialist`."""

from trialist.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
