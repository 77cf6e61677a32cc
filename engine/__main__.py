"""`python -m engine`: run, chat, bench and the small tools around them."""

from engine.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
