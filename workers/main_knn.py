"""k nearest neighbours on frozen features. Two protocols, two names; do not compare the numbers:

``knn/loo1``     the nearest other picture inside the validation split (Latent MIM's own evaluation);
``knn/top1_kK``  a vote of the K nearest training pictures, weighted by exp(cosine / temperature) (Wu et al., CVPR 2018;
                 DINO's evaluation). With several ``temperatures`` T: ``knn/top1_kK_tT``.
"""

from __future__ import annotations

from contract.settings.main_knn import Settings
from workers.data.few import few, same_classes
from workers.engine import pictures, probe
from workers.engine.encoder import load_encoder
from workers.engine.frozen import Frozen, Reading, block_of, renormalised
from workers.engine.run import open_run
from workers.transforms.crops import ResizeCenterCrop


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_encoder(settings.encoder, image_size=settings.image_size)
        oracle = load_encoder(settings.oracle, image_size=settings.image_size) if settings.oracle else None
        frozen = Frozen(
            encoder,
            [Reading(settings.features, block_of(encoder, settings.block))],
            final_norm=settings.final_norm == "encoder",
            oracle=oracle,
            to_oracle=renormalised(settings, encoder, oracle),
        )
        transform = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        prepare = pictures.normaliser(settings, encoder)
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        same_classes(train, val)
        train = few(train, shots=settings.shots, fraction=settings.fraction, seed=settings.split_seed)
        loaders = [pictures.in_order(settings, each, transform, settings.batch_size) for each in (train, val)]
        bank, query = (probe.encoded(frozen.packed, each, prepare) for each in loaders)
        metrics = {"knn/loo1": probe.leave_one_out(*query)}
        temperatures = settings.temperatures or [settings.temperature]
        voted = probe.knn_grid(*bank, *query, k=settings.k, temperatures=temperatures, classes=len(train.classes))
        for (k, temperature), right in voted.items():
            metrics[f"knn/top1_k{k}" + (f"_t{temperature:g}" if settings.temperatures else "")] = right
        metrics |= pictures.skipped(settings, *loaders)
        run.track(1, 1, metrics)
        run.finish(metrics, 1)


if __name__ == "__main__":
    main()
