"""The hot-expert cache: who is hot (tracker), what to swap (policy), who is where (slots)."""
