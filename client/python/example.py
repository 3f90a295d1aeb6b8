"""Asks a key about a text.

::

    python client/python/example.py 127.0.0.1:8470 acme/reviews "Kept me dry all week."
"""

from __future__ import annotations

import sys

from modelyard import Client, ModelyardError


def main(target: str, key: str, text: str) -> int:
    """Prints the answer, or what the server has against the question."""
    with Client(target, timeout_s=30) as client:
        try:
            answer = client.predict(key, [text])
        except ModelyardError as error:
            print(error.code.name, error.reason, *error.violations, error, file=sys.stderr)
            return 1
    for name, value in answer.items():
        print(name, value)
    print(f"served by {answer.served.model} on {answer.served.device}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: example.py HOST:PORT KEY TEXT")
    sys.exit(main(*sys.argv[1:]))
