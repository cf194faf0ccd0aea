"""Adversarial style augmentation for domain generalization (Zhang et al., arXiv 2301.12643).

The claim: a network trained on one domain classifies unseen domains better when the style (mean and standard deviation
of each channel) of its features is shifted, in training, by noise whose intensity per channel is learned by gradient
reversal to make the loss large.

The technique itself is the callback ``callbacks.style.AdvStyle`` and plugs into every recipe; what is here is what it
is trained and tested on: classification of images from other domains, and the second task, retrieval of the same
instance across domains (person re-identification).

Where code and paper differ we follow the code, which is a mixture of identity, DSU and AdvStyle by thirds for
classification (the paper speaks of AdvStyle alone); its re-identification code learns the direction only
(``variant: direction``). What is sound in ours and not in theirs is listed in ``callbacks/style.py``. The released
``adv_weight`` of 10 goes with a learning rate of 0.001; the product, 0.01, is the rate at which the intensities ascend
and what has to be kept when the learning rate changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from recipes.classifier import Classifier

# ---------------------------------------------------------------------- retrieval


def retrieval_scores(
    query: Tensor,
    gallery: Tensor,
    query_label: Tensor,
    gallery_label: Tensor,
    query_camera: Tensor | None = None,
    gallery_camera: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """CMC rank-1 and mean average precision by cosine similarity, in the protocol of Market-1501.

    For each query, gallery images of the same instance *and* the same camera are left out; a query without any other
    image of its instance doesn't count.

    Args:
        query: (Q, D) embeddings.
        gallery: (G, D) embeddings.
        query_label: (Q,) instances.
        gallery_label: (G,) instances.
        query_camera: (Q,) cameras; omitted: nothing is left out.
        gallery_camera: (G,) cameras.

    Returns:
        rank-1 and mAP in [0, 1] (nan where no query counts), and how many queries count.
    """
    query, gallery = F.normalize(query.float(), dim=-1), F.normalize(gallery.float(), dim=-1)
    ranked, precise = [], []
    for q in range(len(query)):
        same = gallery_label == query_label[q]
        keep = torch.ones_like(same)
        if query_camera is not None and gallery_camera is not None:
            keep = ~(same & (gallery_camera == query_camera[q]))
        relevant = same[keep]
        if relevant.any():
            # above zero, since torchmetrics takes what scores less as not retrieved
            similarity = (gallery[keep] @ query[q]).double() + 2
            ranked.append(retrieval_hit_rate(similarity, relevant, top_k=1))
            precise.append(retrieval_average_precision(similarity, relevant))
    if not ranked:
        nan = torch.tensor(float("nan"))
        return nan, nan, 0
    return torch.stack(ranked).mean(), torch.stack(precise).mean(), len(ranked)


# ---------------------------------------------------------------------- the recipe


class DomainGeneralizer(Classifier):
    """A classifier, or an embedding for retrieval, to be tested on domains that it wasn't trained on.

    Args:
        task: ``classification``: accuracy per target domain. ``retrieval``: trained to tell the training instances
            apart, tested by CMC rank-1 and mAP of queries against a gallery; batches of the test data have ``camera``
            and ``query`` beside ``label`` and ``domain``.
        embedding_dim: of the embedding, for retrieval: Linear, batch norm and ReLU after the backbone (the released
            ``resnet50_fc512``).

    Other arguments: see :class:`recipes.classifier.Classifier`.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 10,
        in_chans: int = 3,
        image_size: int = 224,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        task: Literal["classification", "retrieval"] = "classification",
        embedding_dim: int = 512,
        **classifier: Any,
    ) -> None:
        if task not in ("classification", "retrieval"):
            raise ValueError(f"task must be classification or retrieval, not '{task}'")
        super().__init__(backbone, num_classes, in_chans, image_size, class_names, domain_names, **classifier)
        self.save_hyperparameters()
        if task == "retrieval":
            self.backbone.reset_classifier(0)
            features = int(getattr(self.backbone, "head_hidden_size", self.backbone.num_features))
            self.neck = nn.Sequential(nn.Linear(features, embedding_dim), nn.BatchNorm1d(embedding_dim), nn.ReLU())
            self.head = nn.Linear(embedding_dim, num_classes)
        self._seen: list[dict[str, Tensor]] = []

    def embed(self, image: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim) of images (B, C, H, W) in [0, 1]; for retrieval."""
        return self.neck(super().forward(image))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [0, 1]."""
        return self.head(self.embed(image)) if self.hparams["task"] == "retrieval" else super().forward(image)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if "query" not in batch:  # a classifier; or images of the training instances, told apart by the head
            return super().validation_step(batch, batch_idx)
        self._embed(batch)

    def on_validation_epoch_end(self) -> None:
        if self._seen:
            rank1, precision = self._scores()["mean"]
            self.log("val/map", precision, sync_dist=True)
            self.log("val/acc", rank1, sync_dist=True, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.hparams["task"] == "classification":
            return super().test_step(batch, batch_idx)
        self._embed(batch)

    def on_test_epoch_end(self) -> None:
        """For retrieval: ``test/rank1_<domain>`` and ``test/map_<domain>``, and their plain means over domains."""
        if self.hparams["task"] == "classification":
            return super().on_test_epoch_end()
        scores = self._scores()
        for name, (rank1, precision) in scores.items():
            suffix = "" if name == "mean" else f"_{name}"
            self.log(f"test/rank1{suffix}", rank1, sync_dist=True)
            self.log(f"test/map{suffix}", precision, sync_dist=True)

    def _embed(self, batch: dict[str, Tensor]) -> None:
        kept = {name: batch[name] for name in ("label", "camera", "query", "domain")}
        self._seen.append({"embedding": self.embed(batch["image"]), **kept})

    def _scores(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Rank-1 and mAP of what was embedded, per domain and (``mean``) their plain mean."""
        seen = {name: self._over_ranks(torch.cat([b[name] for b in self._seen])).cpu() for name in self._seen[0]}
        self._seen.clear()
        scores = {}
        for d in seen["domain"].unique().tolist():
            query = seen["query"].bool() & (seen["domain"] == d)
            gallery = ~seen["query"].bool() & (seen["domain"] == d)
            pairs = [seen[name][chosen] for name in ("embedding", "label", "camera") for chosen in (query, gallery)]
            rank1, precision, count = retrieval_scores(*pairs)
            if count:
                scores[self.domain_names[d]] = (rank1.to(self.device), precision.to(self.device))
        if not scores:
            raise ValueError("no query has another image of its instance in the gallery: nothing to measure")
        rank1, precision = torch.stack([torch.stack(pair) for pair in scores.values()]).mean(0)
        return {**scores, "mean": (rank1, precision)}

    def _over_ranks(self, values: Tensor) -> Tensor:
        """The values of all ranks, (ranks * n, ...), where ranks may hold different numbers of them."""
        if self.trainer.world_size == 1:
            return values
        sizes = torch.as_tensor(self.all_gather(torch.tensor(len(values), device=self.device))).tolist()
        padded = F.pad(values, [0, 0] * (values.dim() - 1) + [0, max(sizes) - len(values)])
        return torch.cat([part[:n] for part, n in zip(torch.as_tensor(self.all_gather(padded)), sizes, strict=True)])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        if self.hparams["task"] == "classification":
            return super().predict_step(batch, batch_idx)
        return {"index": batch.get("index"), "embedding": self.embed(batch["image"])}
