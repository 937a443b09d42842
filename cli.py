"""The `nibble` command: one line per verb; each verb's code lives in its own room and is imported on use."""


def main() -> None:
    raise SystemExit("not wired yet")
