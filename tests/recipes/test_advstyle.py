"""The recipe of adversarial style augmentation: its retrieval protocol against a plain reading of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from callbacks.style import AdvStyle
from datamodules import EmojiRetrieval
from datamodules.sampling import Draw
from recipes.advstyle import DomainGeneralizer
from recipes.advstyle.module import retrieval_scores

SMALL = {"backbone": "resnet10t", "backbone_args": {"channels": (8, 8, 16, 16), "stem_width": 8}}


def plain_scores(query, gallery, query_label, gallery_label, query_camera, gallery_camera):  # type: ignore[no-untyped-def]
    """Rank-1 and mAP, one query at a time, in float64 NumPy."""
    first, average = [], []
    for q, label, camera in zip(query, query_label, query_camera, strict=True):
        cosine = gallery @ q / np.linalg.norm(gallery, axis=1) / np.linalg.norm(q)
        order = [i for i in np.argsort(-cosine) if not (gallery_label[i] == label and gallery_camera[i] == camera)]
        hits = [gallery_label[i] == label for i in order]
        if not any(hits):
            continue
        first.append(hits[0])
        average.append(np.mean([sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits) if hit]))
    return (np.mean(first), np.mean(average), len(first)) if first else (np.nan, np.nan, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 30), st.integers(1, 5))
def test_retrieval_scores_are_those_of_the_protocol(seed: int, queries: int, gallery: int, labels: int) -> None:
    rng = np.random.default_rng(seed)
    q, g = rng.normal(size=(queries, 7)), rng.normal(size=(gallery, 7))
    ql, gl = rng.integers(0, labels, queries), rng.integers(0, labels, gallery)
    qc, gc = rng.integers(0, 3, queries), rng.integers(0, 3, gallery)
    rank1, precision, count = retrieval_scores(*map(torch.from_numpy, (q, g, ql, gl, qc, gc)))
    wanted = plain_scores(q, g, ql, gl, qc, gc)
    assert count == wanted[2]
    np.testing.assert_allclose([rank1, precision], wanted[:2], atol=1e-6)


def test_an_image_of_the_same_camera_is_no_hit() -> None:
    one = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.6]])
    labels, cameras = torch.tensor([3, 3, 4]), torch.tensor([0, 1, 1])
    rank1, precision, count = retrieval_scores(one, gallery, torch.tensor([3]), labels, torch.tensor([0]), cameras)
    assert (rank1, precision, count) == (
        0.0,
        0.5,
        1,
    )  # the twin of camera 0 is left out, label 4 comes before the other
    rank1, precision, _ = retrieval_scores(one, gallery, torch.tensor([3]), labels)
    assert rank1 == 1.0 and precision == pytest.approx((1 + 2 / 3) / 2)


def test_retrieval_on_emoji_reports_each_target(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = EmojiRetrieval(sources=["noto", "openmoji"], targets=["twemoji", "fluent"], seed=0)
    model = DomainGeneralizer(
        num_classes=data.num_classes,
        image_size=32,
        class_names=data.class_names,
        domain_names=data.domain_names,
        task="retrieval",
        embedding_dim=16,
        **SMALL,
    )
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        callbacks=[AdvStyle(variant="direction", p_identity=0.5, p_dsu=0.0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    assert {"val/acc", "val/map"} <= trainer.callback_metrics.keys()
    trainer.test(model, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    assert found.keys() == {f"test/{m}{d}" for m in ("rank1", "map") for d in ("", "_twemoji", "_fluent")}
    # the same from the embeddings themselves: 129 queries against the gallery of both sources
    model.eval()
    for domain, name in ((1, "twemoji"), (2, "fluent")):
        whole = data.part("test")
        everything = whole.__getitems__([Draw(0, i) for i in range(len(whole))])
        chosen = everything["domain"] == domain
        with torch.no_grad():
            embedded = model.embed(everything["image"][chosen]).double().numpy()
        is_query = everything["query"][chosen].bool().numpy()
        assert is_query.sum() == 129 and (~is_query).sum() == 258
        label, camera = everything["label"][chosen].numpy(), everything["camera"][chosen].numpy()
        wanted = plain_scores(
            embedded[is_query],
            embedded[~is_query],
            label[is_query],
            label[~is_query],
            camera[is_query],
            camera[~is_query],
        )
        assert found[f"test/rank1_{name}"] == pytest.approx(wanted[0], abs=0.02)  # ties and float32
        assert found[f"test/map_{name}"] == pytest.approx(wanted[1], abs=0.02)


def test_a_wrong_task_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="classification or retrieval"):
        DomainGeneralizer(task="segmentation", image_size=32, **SMALL)  # type: ignore[arg-type]
