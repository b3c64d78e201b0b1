"""How the routers of a mixture of experts do: what a log interval's choices say, and a warning when an expert starves.

Shape letters: L layers with experts of the whole model, E experts, G groups of tokens (megavlm.models.moe.health).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavlm.build import Parts
from megavlm.engines import MegatronEngine
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import health
from megavlm.training.starvation import StarvationAlarm


@dataclass(frozen=True)
class View:
    """The routing of some of the tokens: those of a modality, of a data source, or all. Float64 on the CPU."""

    name: str
    """``all``, ``image``, ``text``, or the name of a source."""
    num_tokens: int
    choices: Tensor
    """``[L, E]``: how often each expert was chosen."""
    kept: Tensor
    """``[L, E]``: how often it had room."""
    mean_scores: Tensor
    """``[L, E]``."""
    entropy: Tensor
    """``[L]``: mean over tokens of the entropy of a token's scores, as a share of that of even scores: 1 where the
    router knows no difference between experts, 0 where it is certain."""
    z_loss: Tensor
    """``[L]``: mean over tokens; 0 where the model has none."""

    @property
    def load(self) -> Tensor:
        """``[L, E]``: choices as multiples of the even share. Mean 1."""
        return self.choices / self.choices.mean(dim=1, keepdim=True)

    @property
    def max_over_mean(self) -> Tensor:
        """``[L]``: load of the busiest expert; 1 is even, E / top-k is collapsed."""
        return self.load.amax(dim=1)

    @property
    def num_dead(self) -> Tensor:
        """``[L]`` int64: experts that no token chose."""
        return (self.choices == 0).sum(dim=1)

    @property
    def dropped(self) -> Tensor:
        """``[L]``: share of the choices that found the expert full."""
        return 1.0 - self.kept.sum(dim=1) / self.choices.sum(dim=1)

    @property
    def entropy_of_mean(self) -> Tensor:
        """``[L]``: entropy of the mean scores, as a share of the largest: near 0 when all tokens want one expert."""
        return torch.special.entr(self.mean_scores).sum(dim=1) / math.log(self.mean_scores.shape[1])

    @property
    def load_balancing_loss(self) -> Tensor:
        """``[L]``: what ``aux_loss`` would be if these tokens were one batch."""
        shares = self.choices / self.choices.sum(dim=1, keepdim=True)
        return self.choices.shape[1] * (shares * self.mean_scores).sum(dim=1)

    def numbers(self) -> dict[str, Any]:
        """For ``metrics.jsonl``: the tokens, and a list over layers of each measure."""
        measures = {
            "max/mean load": self.max_over_mean,
            "entropy": self.entropy,
            "entropy of mean": self.entropy_of_mean,
            "dead experts": self.num_dead,
            "dropped tokens": self.dropped,
            "load balancing loss": self.load_balancing_loss,
            "z loss": self.z_loss,
        }
        return {"tokens": self.num_tokens} | {name: _rounded(values) for name, values in measures.items()}


@dataclass(frozen=True)
class Health:
    """What the routers did in some steps, over all ranks."""

    layers: tuple[int, ...]
    """Indices of the layers with experts, counted from 0."""
    num_steps: int
    everything: View
    """All tokens but padding."""
    modalities: list[View]
    """Those that had any token."""
    sources: list[View]
    """The same; empty where the run has one source only."""
    losses: dict[str, float]
    """What was added to the loss, before its coefficient, mean over layers and tokens: those of ``load balancing loss``
    and ``z loss`` that the run has."""

    @property
    def views(self) -> list[View]:
        """All, most general first."""
        return [self.everything, *self.modalities, *self.sources]

    def log_text(self) -> str:
        """The piece of the log line: worst layer's load, all layers' dead experts and dropped choices."""
        loads = " ".join(f"{view.name} {view.max_over_mean.max():.2f}" for view in self.modalities)
        return (
            "".join(f" {name}: {value:.6E} |" for name, value in self.losses.items())
            + f" router max/mean load: {loads} |"
            + f" dead experts: {self.everything.num_dead.sum()} |"
            + f" dropped tokens: {100.0 * self.everything.dropped.mean():.2f}% |"
        )

    def numbers(self) -> dict[str, Any]:
        """For ``metrics.jsonl``."""
        views = [{"name": view.name, **view.numbers()} for view in self.views]
        return {"layers": list(self.layers), "steps": self.num_steps, **self.losses, "views": views}

    def loads(self) -> dict[str, Any]:
        """For ``metrics.jsonl``: the load of each expert ``[L][E]``, which is much longer than the rest."""
        views = [{"name": view.name, "tokens": view.num_tokens, "load": _rounded(view.load)} for view in self.views]
        return {"layers": list(self.layers), "steps": self.num_steps, "views": views}

    def points(self) -> dict[str, float]:
        """TensorBoard's scalars."""
        points = {f"router/{name}": value for name, value in self.losses.items()}
        for view in self.views:
            for row, layer in enumerate(self.layers):
                points[f"router/layer_{layer}/max over mean load/{view.name}"] = view.max_over_mean[row].item()
                points[f"router/layer_{layer}/entropy/{view.name}"] = view.entropy[row].item()
                points[f"router/layer_{layer}/dead experts/{view.name}"] = view.num_dead[row].item()
                points[f"router/layer_{layer}/dropped tokens/{view.name}"] = view.dropped[row].item()
        return points


class RouterHealth:
    """Reads the routers of a run's model chunks. Every rank calls the same methods at the same time."""

    def __init__(
        self, engine: MegatronEngine, language: LanguageConfig, source_names: Sequence[str], *, is_trained: bool
    ) -> None:
        """Begin to count.

        Args:
            engine: its chunks are observed, and it adds up over the ranks.
            language: of the model; has experts.
            source_names: of the data sources, in the order of ``Batch.sources``.
            is_trained: whether the routers learn.
        """
        assert language.moe is not None
        self._engine = engine
        self._moe = language.moe
        self._layers = language.layers_with_experts
        self._source_names = list(source_names)
        self._observers = [chunk.language.router_observer for chunk in engine.chunks]
        self._alarm = StarvationAlarm(language.moe, self._layers, is_trained=is_trained)
        balances = self._moe.moe_router_load_balancing_type != "none" and self._moe.moe_aux_loss_coeff > 0
        self._loss_names = {}
        if is_trained and balances:
            self._loss_names["load_balancing_loss"] = "load balancing loss"
        if is_trained and self._moe.moe_z_loss_coeff:
            self._loss_names["z_loss"] = "z loss"
        self._since_loads = (torch.zeros(len(self._layers), self._width, dtype=torch.float64), 0)
        for observer in self._observers:
            observer.tell_apart(len(self._source_names))

    @property
    def _width(self) -> int:
        return health.width(self._moe.num_moe_experts, len(self._source_names))

    def take(self, num_steps: int) -> Health | None:
        """Sum up the steps since the last call over all ranks, and warn of experts that starve.

        Args:
            num_steps: how many steps those were.

        Returns:
            The same on every rank; None if no token came to a router.
        """
        table = torch.zeros(len(self._layers), self._width, dtype=torch.float64)
        for observer in self._observers:
            if observer.layers:  # a stage may have dense layers only
                table[[self._layers.index(layer) for layer in observer.layers]] += observer.take().cpu()
        # data- and tensor-parallel ranks hold shares of the tokens, pipeline stages the layers: all of it is one sum
        table = torch.tensor(self._engine.sum_over_ranks(table.flatten().tolist()), dtype=torch.float64).view_as(table)
        before, steps_before = self._since_loads
        self._since_loads = (before + table, steps_before + num_steps)
        found = self._health(table, num_steps)
        if found is not None:
            self._alarm.check(found.everything, found.modalities, num_steps)
        return found

    def take_loads(self) -> Health | None:
        """What :meth:`take` gave since the last call of this method, as one; None if that was nothing."""
        table, num_steps = self._since_loads
        self._since_loads = (torch.zeros_like(table), 0)
        return self._health(table, num_steps)

    def _health(self, table: Tensor, num_steps: int) -> Health | None:
        num_sources = len(self._source_names)
        sums = health.unpack(table, self._moe.num_moe_experts, num_sources)
        num_tokens = sums["tokens"].sum(dim=1)
        if not num_tokens.sum():
            return None
        num_strangers = int(sums["tokens"][0, -1])
        assert num_strangers == 0, f"{num_strangers} tokens of sources beyond the {num_sources} that have names"
        modalities = health.MODALITIES
        parts = {
            name: [modality * num_sources + source for source in range(num_sources)]
            for modality, name in enumerate(modalities)
        }
        modality_views = [view for name in reversed(modalities) if (view := _view(name, sums, parts[name]))]
        source_views = [
            _view(name, sums, [modality * num_sources + source for modality in range(len(modalities))])
            for source, name in enumerate(self._source_names)
        ]
        everything = _view("all", sums, list(range(len(modalities) * num_sources)))
        assert everything is not None
        return Health(
            layers=self._layers,
            num_steps=num_steps,
            everything=everything,
            modalities=modality_views,
            sources=[view for view in source_views if view] if num_sources > 1 else [],
            losses={text: (sums[name] / num_tokens).mean().item() for name, text in self._loss_names.items()},
        )


def router_health_of(parts: Parts) -> RouterHealth | None:
    """What reads the routers of a run whose model is wrapped; None: it has none."""
    recipe = parts.recipe
    if recipe.model.language.moe is None:
        return None
    is_trained = "language" in recipe.training.trainable
    return RouterHealth(parts.engine, recipe.model.language, recipe.data.train.source_names, is_trained=is_trained)


def _view(name: str, sums: dict[str, Tensor], groups: list[int]) -> View | None:
    """What the tokens of some groups did; None if there are none."""
    some = {name: values[:, groups].sum(dim=1) for name, values in sums.items() if values.dim() > 1}
    num_tokens = some["tokens"]
    if not num_tokens[0]:
        return None
    return View(
        name=name,
        num_tokens=int(num_tokens[0]),
        choices=some["chosen"],
        kept=some["kept"],
        mean_scores=some["scores"] / num_tokens.unsqueeze(1),
        entropy=some["entropy"] / num_tokens / math.log(some["scores"].shape[1]),
        z_loss=some["squared_log_sums"] / num_tokens,
    )


def _rounded(values: Tensor) -> Any:
    """As nested lists of numbers with four digits: enough for a picture."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.4g}") if isinstance(value, float) else value for value in values.tolist()]
