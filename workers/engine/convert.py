"""``python -m workers.engine.convert FILE FOLDER IDENTITY``: any file of weights that evaluations read, as
``FOLDER/encoder.pt``."""

from __future__ import annotations

import sys
from pathlib import Path

from workers.engine.encoder import EncoderError, load_encoder, save_encoder


def main(where: str, folder: str, identity: str) -> int:
    try:
        save_encoder(Path(folder), load_encoder(where), identity)
    except EncoderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
