"""k nearest neighbours on frozen features. Two protocols, two names; do not compare the numbers:

``knn/loo1``     the nearest other picture inside the validation split (Latent MIM's own evaluation);
``knn/top1_kK``  a vote of the K nearest training pictures, weighted by exp(cosine / temperature) (Wu et al., CVPR 2018;
                 DINO's evaluation).
"""

from __future__ import annotations

from contract.settings.main_knn import Settings
from workers.engine import pictures, probe
from workers.engine.encoder import load_encoder
from workers.engine.run import open_run
from workers.transforms.crops import ResizeCenterCrop


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_encoder(settings.encoder)
        transform = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        prepare = pictures.normaliser(settings)
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        loaders = [pictures.in_order(settings, each, transform, settings.batch_size) for each in (train, val)]
        bank, query = (probe.features(encoder, each, prepare, settings.features) for each in loaders)
        metrics = {"knn/loo1": probe.leave_one_out(*query)}
        voted = probe.weighted_knn(
            *bank, *query, k=settings.k, temperature=settings.temperature, classes=len(train.classes)
        )
        metrics |= {f"knn/top1_k{k}": value for k, value in voted.items()}
        metrics |= pictures.skipped(settings, *loaders)
        run.track(1, 1, metrics)
        run.finish(metrics, 1)


if __name__ == "__main__":
    main()
