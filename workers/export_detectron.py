"""An encoder as ``detectron2.pkl``, which Detectron2 takes as MODEL.WEIGHTS (ViTDet: ``train.init_checkpoint``).

The file is read back, mapped to our names and compared tensor by tensor before the run counts as finished.
``done.json`` says what was left out and why, and under ``model`` what Detectron2 has to be told for the rest to fit:
keys of its configuration for a ResNet, arguments of its ``ViT`` for a vision transformer.
"""

from __future__ import annotations

from contract.settings.export_detectron import Settings
from workers.engine import detectron, distributed
from workers.engine.encoder import load_encoder
from workers.engine.run import open_run


def main() -> None:
    with open_run(Settings) as run:
        s = run.settings
        encoder = load_encoder(s.encoder, checkpoint_key=s.checkpoint_key, heads=s.heads)
        found = detectron.write(run.folder, encoder) if distributed.rank() == 0 else detectron.named(encoder)
        metrics = {"export/tensors": float(len(found.arrays)), "export/left_out": float(len(found.left_out))}
        run.track(1, 1, metrics)
        run.finish(metrics, 1, file=detectron.FILE, model=found.model, left_out=found.left_out)


if __name__ == "__main__":
    main()
