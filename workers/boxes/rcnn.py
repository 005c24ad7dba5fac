"""Faster and Mask R-CNN (Ren et al., NeurIPS 2015; He et al., ICCV 2017): torchvision's parts, Detectron2's values.

``head="c4"``: regions are pooled from the third stage's map, and the fourth stage, with one more BatchNorm behind it
(He et al., CVPR 2020, appendix A.3), works on each of them. ``head="fpn"``: a pyramid of all stages (Lin et al., CVPR
2017) under two linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision.models.detection.roi_heads as parts
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from workers.models.resnet import ResNet

DIVISOR = 32  # batches are padded to a multiple, so that the maps' strides are whole
RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors
CANDIDATES = {"c4": {"training": 12000, "testing": 6000}, "fpn": {"training": 2000, "testing": 1000}}  # before NMS
PROPOSALS = {"c4": 2000, "fpn": 1000}  # and after it, in training
MOST = 100  # detections in a picture
FAINTEST = 0.05  # score of a detection
PYRAMID, HIDDEN, MASKED = 256, 1024, 256  # channels

Maps = dict[str, Tensor]
Target = dict[str, Tensor]
"""``boxes`` (n, 4), ``labels`` (n,) from 1, and for masks ``masks`` (n, H, W) in the file's pixels and ``scale`` (4,)
from the network's pixels to those."""


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W), padded with zeros at the right and the bottom
    sizes: list[tuple[int, int]]  # height and width without the padding
    targets: list[Target]


def padded(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pictures (3, h, w) of any size, as one batch."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(size[axis] for size in sizes) // DIVISOR) * DIVISOR for axis in (0, 1))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def cut_out(masks: Tensor, boxes: Tensor, which: Tensor, side: int) -> Tensor:
    """What the mask in each box (k, 4) should be, of ``masks`` (n, H, W) that of ``which`` (k,): (k, side, side)."""
    places = torch.cat([which[:, None].to(boxes), boxes], dim=1)
    shapes: Tensor = roi_align(masks[:, None].to(boxes), places, side, sampling_ratio=0, aligned=True)
    return (shapes[:, 0] >= 0.5).to(boxes)


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (1, m, m) in its box (4,), at the centres of a picture's pixels: (H, W), 0 outside. Bilinear and exact, as
    Detectron2 pastes; torchvision rounds the box to whole pixels."""
    left, top, right, bottom = box.unbind()
    y, x = (torch.arange(side, device=mask.device, dtype=mask.dtype) + 0.5 for side in size)
    x, y = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    out: Tensor = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]
    return out


class Pool(nn.Module):
    """RoIAlign with the half-pixel offset (Detectron2's ROIAlignV2), from one map: -> (R, D, side, side)."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.scale = side, 1.0  # of the map over the pictures; set by the detector

    def forward(self, maps: Maps, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        (found,) = maps.values()
        out: Tensor = roi_align(found, boxes, self.side, self.scale, sampling_ratio=0, aligned=True)
        return out


class FloatHead(RPNHead):  # type: ignore[misc]  # torchvision has no types
    """Scores and offsets in float32 under AMP."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, offsets = super().forward(x)
        return [each.float() for each in scores], [each.float() for each in offsets]


class Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, with Detectron2's L1 loss for boxes; torchvision's own is smooth."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.where(torch.cat(each))[0] for each in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        offsets, wanted = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        scores = objectness.flatten()[sampled]
        found = F.binary_cross_entropy_with_logits(scores, torch.cat(labels)[sampled])
        return found, F.l1_loss(offsets, wanted, reduction="sum") / max(len(sampled), 1)


class Heads(parts.RoIHeads):  # type: ignore[misc]
    """What is in each proposal. With ``stage``, boxes and masks are read from the same maps of the regions, as in
    Detectron2's C4; torchvision would compute them twice, and BatchNorm would see two kinds of batches."""

    def __init__(self, stage: bool, **others: Any):
        super().__init__(**others)
        self.stage = stage

    def forward(
        self,
        features: Maps,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is None:
            return self.detected(features, proposals, image_shapes), {}
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        regions = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, offsets = (each.float() for each in self.box_predictor(self.vector(regions)))
        labels_, wanted_ = torch.cat(labels), torch.cat(wanted)
        positive = torch.where(labels_ > 0)[0]
        own = offsets.view(len(offsets), -1, 4)[positive, labels_[positive]]
        losses = {
            "loss_class": F.cross_entropy(logits, labels_),
            "loss_box": F.l1_loss(own, wanted_[positive], reduction="sum") / max(len(labels_), 1),
        }
        if self.mask_predictor is not None:
            chosen = [torch.where(each > 0)[0] for each in labels]
            boxes = [each[here] for each, here in zip(proposals, chosen, strict=True)]
            if self.stage:
                maps = regions[positive]
            else:
                maps = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
            shapes = self.mask_predictor(maps).float()
            which = [each[here] for each, here in zip(matched, chosen, strict=True)]
            whole = [
                cut_out(target["masks"], each * target["scale"], of, shapes.shape[-1])
                for target, each, of in zip(targets, boxes, which, strict=True)
            ]
            own = shapes[torch.arange(len(shapes)), labels_[positive]]
            found = F.binary_cross_entropy_with_logits(own, torch.cat(whole), reduction="sum")
            losses["loss_mask"] = found / max(own.numel(), 1)
        return [], losses

    def detected(
        self, features: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        regions = self.box_head(self.box_roi_pool(features, proposals, sizes))
        logits, offsets = (each.float() for each in self.box_predictor(self.vector(regions)))
        boxes, scores, labels = self.postprocess_detections(logits, offsets, proposals, sizes)
        found = [{"boxes": b, "scores": s, "labels": label} for b, s, label in zip(boxes, scores, labels, strict=True)]
        if self.mask_predictor is not None:
            if self.stage:
                maps = self.box_head(self.box_roi_pool(features, boxes, sizes))
            else:
                maps = self.mask_head(self.mask_roi_pool(features, boxes, sizes))
            masks = parts.maskrcnn_inference(self.mask_predictor(maps).float(), labels)
            for each, mask in zip(found, masks, strict=True):
                each["masks"] = mask
        return found

    @staticmethod
    def vector(regions: Tensor) -> Tensor:
        """(R, D, h, w) -> (R, D); (R, D) as it is."""
        return regions.mean((2, 3)) if regions.ndim == 4 else regions


class Stage(nn.Module):
    """The encoder's fourth stage, which stays the encoder's own, and the extra norm: (R, C, 14, 14) -> (R, D, 7, 7)."""

    def __init__(self, encoder: ResNet, extra_norm: bool):
        super().__init__()
        self._encoder = (encoder,)  # not registered a second time
        self.norm = nn.BatchNorm2d(encoder.width) if extra_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self._encoder[0].layer4(x))
        return out


def channels(stage: Any) -> int:
    """Of the map that a stage of a ResNet gives."""
    block = stage[-1]
    found: int = (block.bn3 if hasattr(block, "bn3") else block.bn2).num_features
    return found


class Detector(nn.Module):
    """``classes`` kinds of objects upon an encoder, all of which learns."""

    def __init__(
        self,
        encoder: ResNet,
        classes: int,
        *,
        head: Literal["c4", "fpn"] = "c4",
        extra_norm: bool = True,
        masks: bool = False,
        anchors: list[int],
        rois: int = 512,
        roi_size: int = 14,
        proposals: int = 1000,
    ):
        super().__init__()
        self.encoder, self.kind = encoder, head
        stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        if head == "c4":
            width = channels(encoder.layer3)
            sizes: tuple[tuple[int, ...], ...] = (tuple(anchors),)
            box_head: nn.Module = Stage(encoder, extra_norm)
            box_width, mask_width, mask_head = encoder.width, encoder.width, None
            box_pool: nn.Module = Pool(roi_size)
            mask_pool: nn.Module | None = None
        else:
            width, sizes = PYRAMID, tuple((each,) for each in anchors)
            self.pyramid = FeaturePyramidNetwork([channels(s) for s in stages], PYRAMID, LastLevelMaxPool())
            names = ["0", "1", "2", "3"]
            box_pool, mask_pool = MultiScaleRoIAlign(names, roi_size // 2, 2), MultiScaleRoIAlign(names, roi_size, 2)
            box_head, box_width = TwoMLPHead(PYRAMID * (roi_size // 2) ** 2, HIDDEN), HIDDEN
            mask_head, mask_width = MaskRCNNHeads(PYRAMID, (MASKED,) * 4, 1), MASKED
        generator = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        self.proposals = Proposals(
            generator,
            FloatHead(width, generator.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=CANDIDATES[head],
            post_nms_top_n={"training": PROPOSALS[head], "testing": proposals},
            nms_thresh=0.7,
        )
        self.heads = Heads(
            head == "c4",
            box_roi_pool=box_pool,
            box_head=box_head,
            box_predictor=FastRCNNPredictor(box_width, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=None,  # 10, 10, 5, 5
            score_thresh=FAINTEST,
            nms_thresh=0.5,
            detections_per_img=MOST,
            mask_roi_pool=mask_pool if masks else None,
            mask_head=mask_head if masks else None,
            mask_predictor=MaskRCNNPredictor(mask_width, MASKED, classes + 1) if masks else None,
        )
        nn.init.normal_(self.heads.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.heads.box_predictor.bbox_pred.weight, std=0.001)
        for layer in (self.heads.box_predictor.cls_score, self.heads.box_predictor.bbox_pred):
            nn.init.zeros_(layer.bias)

    def maps(self, images: Tensor) -> Maps:
        """What regions are pooled from."""
        if self.kind == "c4":
            found = self.encoder.map(images, 3).float()
            self.heads.box_roi_pool.scale = found.shape[-1] / images.shape[-1]
            return {"0": found}
        stages = OrderedDict((str(i), each) for i, each in enumerate(self.encoder.stages(images)))
        return {name: each.float() for name, each in self.pyramid(stages).items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses, and their sum as ``loss``."""
        maps, images = self.maps(batch.images), ImageList(batch.images, batch.sizes)
        proposals, first = self.proposals(images, maps, batch.targets)
        _, second = self.heads(maps, proposals, batch.sizes, batch.targets)
        losses = {"loss_object": first["loss_objectness"], "loss_proposal": first["loss_rpn_box_reg"], **second}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Target]:
        """For each picture ``boxes`` (n, 4) in its pixels, ``scores`` (n,), ``labels`` (n,) from 0, and ``masks``
        (n, 1, h, w), each in its box, where the detector has them."""
        maps = self.maps(images)
        proposals, _ = self.proposals(ImageList(images, sizes), maps)
        found, _ = self.heads(maps, proposals, sizes)
        return [{**each, "labels": each["labels"] - 1} for each in found]
