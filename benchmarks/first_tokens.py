"""Prints the beginning of a text, cut to a number of tokens of the default model.

python benchmarks/first_tokens.py book.txt 16000 > part.txt
"""

from __future__ import annotations

import argparse
import sys

from liftlm import load_document, load_model
from liftlm.config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--model", default=ModelConfig().name)
    options = parser.parse_args()
    model = load_model(options.model)
    ids = model.encode(load_document(options.text).text)[: options.tokens]
    sys.stdout.write(model.decode(ids))


if __name__ == "__main__":
    main()
