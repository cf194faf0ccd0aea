"""Features near a given matrix: the model of "Perturbation Analysis of Neural Collapse", and a network's form of it.

Tirer, Huang, Niles-Weed, ICML 2023, arXiv 2210.16658. Claim: deep layers can't move the features that they are given
arbitrarily far, so collapse is partial, and goes further with depth. The model: features H and linear head W minimise

    f(W, H) = |WH - Y|^2 / (2N) + lam_w |W|^2 / (2K) + lam_h |H - H0|^2 / (2N)

of N examples in K classes, Y their one-hot labels and H0 features that are given. Without H0 (zero in its place) it is
the unconstrained features model, all whose minimisers have collapsed. Proven in the paper: along the *central path*,
dH/dt = -N df/dH at lam_h = 0 with W the best one for each H, tr S_W / tr S_B never rises.

No code of the authors is known to us. The paper's model isn't one that predicts; here an example that isn't in the
table stands at the feature that comes in. ``lam_h`` above zero on the central path, which adds the pull back to H0, is
ours. Features are rows here, (N, d), and the table is in float64: what is claimed is that nothing rises, and float32
would rise by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.diagnostic import dataset_of, take
from callbacks.layers import backbone_of, find_layers
from callbacks.neural_collapse import Moments, find_head, nc1_ratio, pooled
from callbacks.perturbation import parameter_groups
from recipes.classifier.module import Classifier

Mode = Literal["network", "table", "central_path", "alternation"]
MODES: tuple[Mode, ...] = ("network", "table", "central_path", "alternation")
#: Examples whose features are computed at a time.
CHUNK = 1024
#: An example is the table's if its incoming feature is that of its row, but for this part of its length. Mixed
#: precision moves it by less, and other images are much further.
SAME = 0.02

# ---------------------------------------------------------------------- the paper's model


def near_features_loss(
    weight: Tensor, features: Tensor, targets: Tensor, incoming: Tensor, lam_w: float, lam_h: float
) -> Tensor:
    """f(W, H), (): of a head (K, d), features (N, d), one-hot labels (N, K) and the features H0 (N, d)."""
    count = len(features)
    fit = (features @ weight.T - targets).square().sum() / (2 * count)
    pull = (features - incoming).square().sum() / (2 * count)
    return fit + lam_w / (2 * len(weight)) * weight.square().sum() + lam_h * pull


def central_weights(features: Tensor, targets: Tensor, lam_w: float) -> Tensor:
    """W*(H), the head (K, d) that minimises f for features (N, d) and one-hot labels (N, K); lam_w above 0."""
    count, classes = targets.shape
    eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    gram = features.T @ features + lam_w * count / classes * eye
    return torch.linalg.solve(gram, features.T @ targets).T


def nearest_features(weight: Tensor, targets: Tensor, incoming: Tensor, lam_h: float) -> Tensor:
    """H*(W), the features (N, d) that minimise f for a head (K, d); lam_h above 0.

    So deviations within a class are those of ``incoming`` times lam_h / (s^2 + lam_h) along each right singular
    direction of W of singular value s, and as they were where W sees nothing.
    """
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    gram = weight.T @ weight + lam_h * eye
    return torch.linalg.solve(gram, (targets @ weight + lam_h * incoming).T).T


def flow(features: Tensor, targets: Tensor, lam_w: float, incoming: Tensor | None = None, lam_h: float = 0.0) -> Tensor:
    """dH/dt on the central path, (N, d): -N df/dH at W = W*(H); ``incoming`` is needed where lam_h isn't 0."""
    weight = central_weights(features, targets, lam_w)
    moved = -(features @ weight.T - targets) @ weight
    return moved if incoming is None or not lam_h else moved - lam_h * (features - incoming)


def minimise(
    targets: Tensor,
    incoming: Tensor,
    lam_w: float,
    lam_h: float,
    start: Tensor | None = None,
    steps: int = 10000,
    tolerance: float = 1e-13,
) -> tuple[Tensor, Tensor]:
    """A stationary point (W, H) of f, by minimising exactly by W, then by H, and so on.

    Args:
        targets: one-hot labels (N, K).
        incoming: H0 (N, d); zero for unconstrained features.
        lam_w: above 0.
        lam_h: above 0.
        start: H (N, d) to start from; H0 if omitted. Zero is a stationary point, so unconstrained features need one.
        steps: at most so many.
        tolerance: ends when H moves less than this part of its length.
    """
    features = incoming if start is None else start
    for _ in range(steps):
        before = features
        features = nearest_features(central_weights(before, targets, lam_w), targets, incoming, lam_h)
        if bool((features - before).norm() <= tolerance * features.norm()):
            break
    return central_weights(features, targets, lam_w), features


# ---------------------------------------------------------------------- a table as a network


class Table(nn.Module):
    """Features of the training examples, a trainable row for each.

    Args:
        width: of a feature.
    """

    incoming: Tensor
    label: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(0, width, dtype=torch.double))
        self.register_buffer("incoming", torch.empty(0, width, dtype=torch.double))
        self.register_buffer("label", torch.empty(0, dtype=torch.long))

    def fill(self, incoming: Tensor, label: Tensor) -> None:
        """Make a row for each of the examples with these incoming features (N, d), from which it starts."""
        incoming, where = incoming.double(), self.rows.device
        self.rows = nn.Parameter(incoming.clone().to(where))
        self.incoming, self.label = incoming.to(where), label.to(where)

    def forward(self, incoming: Tensor, index: Tensor | None = None) -> Tensor:
        """Features (B, d) of examples with these incoming ones (B, d), float64.

        Rows ``index`` (B,) of the table where those are of the same examples; in training they are. Else ``incoming``.
        """
        incoming = incoming.to(self.rows.dtype)
        if index is None or not len(self.rows):
            return incoming
        if self.training:
            return self.rows[index]
        place = index.clamp_max(len(self.rows) - 1)
        key = self.incoming[place]
        same = ((incoming - key).norm(dim=1) <= SAME * key.norm(dim=1)) & (place == index)
        return torch.where(same[:, None], self.rows[place], incoming)


class TableNetwork(nn.Module):
    """A frozen network, a table of features in place of what it would give, and a linear head without bias.

    Args:
        incoming: gives features (B, d).
        width: d.
        num_classes: outputs.
    """

    def __init__(self, incoming: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.feature_info = [{"num_chs": width, "module": name} for name in ("incoming", "table")]
        self.incoming = incoming.requires_grad_(False)
        self.table = Table(width)
        self.fc = nn.Linear(width, num_classes, bias=False, dtype=torch.double)

    def train(self, mode: bool = True) -> TableNetwork:
        super().train(mode)
        self.incoming.eval()
        return self

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            incoming = self.incoming(x)
        return self.fc(self.table(incoming, index))


# ---------------------------------------------------------------------- the recipe


class _Kept:
    """What the anchor gave and what the head took in a pass, while it is asked for."""

    def __init__(self, anchor: nn.Module, head: nn.Module) -> None:
        self.layer, self.head = anchor, head
        self.asked = self.stays = False
        self.anchor: Any = None
        self.features: Any = None

    def hang(self) -> list[RemovableHandle]:
        """Hang the hooks that note them."""
        return [self.layer.register_forward_hook(self._anchor), self.head.register_forward_pre_hook(self._features)]

    def stay(self) -> None:
        """Hang them for good: a compiled network doesn't see those that come later."""
        if not self.stays:
            self.hang()
            self.stays = True

    def _anchor(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.asked:
            self.anchor = output

    def _features(self, layer: nn.Module, args: Any) -> None:
        if self.asked:
            self.features = args[0]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around a pass of which they are wanted."""
        handles, self.asked = [] if self.stays else self.hang(), True
        try:
            yield
        finally:
            self.asked = False
            for handle in handles:
                handle.remove()

    def take(self) -> tuple[Any, Any]:
        """Both, once: the graph isn't kept any longer."""
        found, self.anchor, self.features = (self.anchor, self.features), None, None
        return found


class NearFeatures(Classifier):
    """A classifier whose features in front of the head are pulled towards an earlier layer's; or the model alone.

    In the modes with a table the backbone is frozen, its features (of training images without augmentation) are H0, and
    each training example has a feature of its own, which starts there. ``backbone mlp`` of depth 1 gives random ReLU
    features. The last two modes take the whole table at each step, whatever the batch. Logged at epochs' ends then:
    ``path/loss``, f; ``path/nc1r``, tr S_W / tr S_B of the table; ``path/end_over_start``, the same over what it was
    for H0; ``path/largest_rise`` of it in any step, 0 if there was none.

    Args:
        mode: ``network``: train the backbone on the objective plus lam_h/2 of the mean squared distance of its features
            from the anchor's, through which no gradient flows. ``table``: gradient descent on f by head and table,
            batch by batch. ``central_path``: W is W*(H), and each step is an Euler step, of length ``lr``, of the flow.
            ``alternation``: each step takes H to its exact minimiser, then W.
        objective: of a network, ``ce`` or ``mse`` (half the squared distance of logits from one-hot labels).
        lam_h: weight of the distance from the anchor, or from H0.
        lam_w: weight of |W|^2 / (2K) in the modes with a table; a network has ``weight_decay``.
        anchor: name of the layer in the backbone near whose features (means over positions or tokens) those in front
            of the head have to stay; if omitted, the last stage but one that is as wide.
        unconstrained: with a table: draw it towards 0 in place of H0 (it starts at H0 all the same).

    Other arguments: see :class:`recipes.classifier.Classifier`; ``lr`` is that of the head in the mode ``table``, and
    with SGD rows have N times as much, as each is in one of N/B batches, with a gradient of 1/B. On the central path
    and in alternation the optimizer, its schedule and weight decay are not asked.

    Raises:
        ValueError: for a setting out of range, or a backbone without an anchor.
    """

    path: Tensor

    def __init__(
        self,
        backbone: str = "mlp",
        num_classes: int = 10,
        in_chans: int = 3,
        image_size: int = 32,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        mode: Mode = "network",
        objective: Literal["ce", "mse"] = "ce",
        lam_h: float = 0.05,
        lam_w: float = 0.005,
        anchor: str | None = None,
        unconstrained: bool = False,
        **classifier: Any,
    ) -> None:
        if mode not in MODES or objective not in ("ce", "mse"):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, objective ce or mse, not {mode} and {objective}")
        if lam_h < 0 or (mode == "alternation" and not lam_h) or not lam_w > 0:
            raise ValueError(f"lam_h must not be negative (in alternation positive), lam_w positive: {lam_h}, {lam_w}")
        super().__init__(backbone, num_classes, in_chans, image_size, class_names, domain_names, **classifier)
        self.save_hyperparameters()
        self.mode, self.objective, self.lam_h, self.lam_w = mode, objective, lam_h, lam_w
        self.unconstrained = unconstrained
        self._kept: _Kept | None = None
        if mode == "network":
            self._anchor = anchor or (_last_as_wide(self.backbone) if lam_h else None)
            if lam_h and self._anchor is not None:
                layer = find_layers(self, [self._anchor])[self._anchor]
                self._kept = _Kept(layer, find_head(self))
        else:
            self.backbone.reset_classifier(0)
            with torch.no_grad():
                width = self.backbone.eval()(self.example_input_array).shape[1]
            self.backbone = TableNetwork(self.backbone, width, num_classes)
            #: NC1r of the table at its start, now, and by how much it has risen at most in one step.
            self.register_buffer("path", torch.zeros(3, dtype=torch.double))

    # ------------------------------------------------------------------ the table

    @property
    def network(self) -> TableNetwork:
        """The network of the modes with a table."""
        network = backbone_of(self)
        assert isinstance(network, TableNetwork)
        return network

    @property
    def table(self) -> Table:
        """Its table."""
        return self.network.table

    def setup(self, stage: str) -> None:
        if self._kept is not None and self.hparams["compile"]:
            self._kept.stay()
        super().setup(stage)
        if stage == "fit" and self.mode != "network":
            self._fill()

    def _fill(self) -> None:
        """Make the table from the training examples, unless it is made."""
        data = getattr(self.trainer, "datamodule", None)
        if not callable(getattr(data, "part", None)):
            raise ValueError("a table needs one of this project's DataModules; with other data use mode network")
        dataset, collate = dataset_of(self.trainer, "train")
        if len(self.table.rows) == len(dataset):
            return
        found, labels, where = [], [], self.table.rows.device
        for first in range(0, len(dataset), CHUNK):
            batch = take(dataset, collate, range(first, min(first + CHUNK, len(dataset))))
            with torch.no_grad():
                found.append(self.network.incoming((batch["image"].to(where) - self.mean) / self.std))
            labels.append(batch["label"])
        self.table.fill(torch.cat(found), torch.cat(labels))
        self.path.zero_()
        self._note()

    @property
    def _pulled_to(self) -> Tensor:
        """H0 (N, d), or zeros."""
        return torch.zeros_like(self.table.incoming) if self.unconstrained else self.table.incoming

    def _targets(self, label: Tensor) -> Tensor:
        return F.one_hot(label, self.hparams["num_classes"]).to(self.table.rows.dtype)

    @torch.no_grad()
    def _note(self) -> None:
        """Take the head that is best for the table, where that is the mode's rule, and note where the table is."""
        rows, label = self.table.rows, self.table.label
        if self.mode in ("central_path", "alternation"):
            weight = self.network.fc.weight.requires_grad_(False)
            weight.copy_(central_weights(rows, self._targets(label), self.lam_w))
        ratio = nc1_ratio(Moments.of(rows, label, self.hparams["num_classes"], widest=0))
        start, before, rise = self.path.tolist()
        now = [start, ratio, max(rise, ratio - before)] if start else [ratio, ratio, 0.0]
        self.path.copy_(torch.tensor(now, dtype=torch.double))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["state_dict"].get("backbone.table.rows")
        if self.mode != "network" and saved is not None and len(saved) != len(self.table.rows):
            self.table.fill(torch.zeros_like(saved), torch.zeros(len(saved), dtype=torch.long))

    # ------------------------------------------------------------------ the loss

    def forward(self, image: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [0, 1]; with a table, of its rows ``index`` (B,)."""
        if self.mode == "network":
            return super().forward(image)
        return self.backbone((image - self.mean) / self.std, index)

    def example_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) of a batch; with a table, of the training examples' rows."""
        return self(batch["image"]) if self.mode == "network" else self(batch["image"], batch.get("index"))

    def _distance(self) -> Tensor:
        """|h - h0|^2 of each example (B,) of the last pass, in a network."""
        assert self._kept is not None
        anchor, features = self._kept.take()
        h = pooled(features, "head", len(features))
        h0 = pooled(anchor, str(self._anchor), len(h)).detach().to(h.dtype)
        if h.shape != h0.shape:
            raise ValueError(
                f"'{self._anchor}' gives {h0.shape[1]} features and the head takes {h.shape[1]}: "
                "name a layer as wide by --model.anchor"
            )
        return (h.float() - h0.float()).square().sum(1)

    def _squares(self, batch: dict[str, Tensor]) -> Tensor:
        """Half the squared distance of logits from one-hot labels, (B,)."""
        logits = self.example_logits(batch)
        return 0.5 * (logits - F.one_hot(batch["label"], logits.shape[1])).square().sum(1)

    def example_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each example (B,); with a table without |W|^2 and the distance from H0."""
        with nullcontext() if self._kept is None else self._kept.passing():
            if self.mode == "network" and self.objective == "ce":
                smoothing = self.hparams["label_smoothing"]
                logits = self(batch["image"])
                losses = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smoothing)
            else:
                losses = self._squares(batch)
        return losses if self._kept is None else losses + self.lam_h / 2 * self._distance()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        label = batch["label"]
        if self.mode == "network":
            with nullcontext() if self._kept is None else self._kept.passing():
                loss = super().loss(batch) if self.objective == "ce" else self._squares(batch).mean()
            return loss if self._kept is None else loss + self.lam_h / 2 * self._distance().mean()
        rows, weight, incoming = self.table.rows, self.network.fc.weight, self._pulled_to
        if self.mode == "table":
            index = batch["index"]
            given = weight, rows[index], self._targets(label), incoming[index]
            return near_features_loss(*given, self.lam_w, self.lam_h)
        targets = self._targets(self.table.label)
        if self.mode == "central_path":  # W is the best one, so this has the flow as its gradient, negated
            return len(rows) * near_features_loss(weight.detach(), rows, targets, incoming, self.lam_w, self.lam_h)
        # A step of length 1 along this gradient ends at the minimiser.
        aim = nearest_features(weight.detach(), targets, incoming, self.lam_h)
        return 0.5 * (rows - aim).square().sum()

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        if self.mode != "network":
            self._note()

    def on_train_epoch_end(self) -> None:
        if self.mode == "network":
            return
        rows, targets = self.table.rows, self._targets(self.table.label)
        with torch.no_grad():
            weight = self.network.fc.weight
            loss = near_features_loss(weight, rows, targets, self._pulled_to, self.lam_w, self.lam_h)
        start, now, rise = self.path.tolist()
        found = {
            "loss": float(loss),
            "nc1r": now,
            "end_over_start": now / start if start else 1.0,
            "largest_rise": rise,
        }
        self.log_dict({f"path/{key}": value for key, value in found.items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.mode == "network":
            return super().configure_optimizers()
        h = self.hparams
        groups = parameter_groups(self, lr=1.0 if self.mode == "alternation" else h["lr"], weight_decay=0.0)
        if self.mode != "table":
            return torch.optim.SGD(groups)
        often = (
            len(self.table.rows) if h["optimizer"] == "sgd" else 1
        )  # Adam's steps don't depend on a gradient's scale
        table = {**groups[0], "name": "table", "lr": h["lr"] * often}
        table |= {"params": [self.table.rows], "parameters": ["backbone.table.rows"]}
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not self.table.rows]
        groups[0]["parameters"] = [n for n in groups[0]["parameters"] if n != "backbone.table.rows"]
        groups.insert(1, table)
        if h["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=h["lr"], momentum=h["momentum"])
        else:
            optimizer = torch.optim.AdamW(groups, lr=h["lr"])
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.lr_factor(epoch))]


def _last_as_wide(backbone: nn.Module) -> str:
    """The last stage but one of a backbone that is as wide as the features in front of its head.

    Raises:
        ValueError: if there is none.
    """
    info: Any = getattr(backbone, "feature_info", None) or []
    width = getattr(backbone, "num_features", None)
    names = dict(backbone.named_modules())
    wide = [entry["module"] for entry in list(info)[:-1] if entry.get("num_chs") == width and entry["module"] in names]
    if not wide:
        raise ValueError(
            f"no stage of {type(backbone).__name__} before the last is {width} wide, as its head's input is: "
            "name a layer that is by --model.anchor, or take a backbone of equal widths (mlp, a ViT), or lam_h 0"
        )
    return wide[-1]
