"""Quality of a model on token windows: perplexity, and divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lrserve.compression.calibrate import PassThrough, replaced
from lrserve.compression.groups import family_of
from lrserve.compression.logits import LOGIT_ROWS, logits_of

_BATCH_TOKENS = 4096  # tokens in one forward pass
_FEWEST_WINDOWS = 4  # in a half from whose spread a difference can be judged
_STANDARD_ERRORS = 3.0  # by which a model has to be worse than a rival to be given up


def _hidden(model: Any, windows: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    states: torch.Tensor = model.base_model(input_ids=windows.to(device), use_cache=False).last_hidden_state
    return states


@torch.inference_mode()
def negative_log_likelihood(model: Any, windows: torch.Tensor, progress: Callable[[int], None] = lambda done: None) -> torch.Tensor:
    """Return each window's mean negative log likelihood in nats, float64 (windows,).

    Every token after a window's first is predicted from all tokens before it in the window.

    Args:
        model: a causal LM.
        windows: int64 (windows, length).
        progress: called with the number of finished windows.
    """
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    means = []
    for first in range(0, len(windows), batch):
        part = windows[first : first + batch]
        hidden = _hidden(model, part)[:, :-1].flatten(0, 1)
        targets = part[:, 1:].flatten().to(hidden.device)
        losses = torch.cat(
            [
                cross_entropy(logits_of(model, h), t, reduction="none")
                for h, t in zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
            ]
        )
        means.append(losses.double().view(len(part), -1).mean(1).cpu())
        progress(first + len(part))
    return torch.cat(means)


def perplexity(model: Any, windows: torch.Tensor, progress: Callable[[int], None] = lambda done: None) -> float:
    """Return exp of the mean negative log likelihood per predicted token."""
    mean = float(negative_log_likelihood(model, windows, progress).mean())
    return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Judgement:
    """What validation windows say of a plan.

    nll: mean negative log likelihood of each window that was run, in nats. Where not all of them were (`complete` is False),
        `perplexity` is an estimate.
    seconds: what the time went into.
    """

    perplexity: float
    nll: tuple[float, ...] = ()
    complete: bool = True
    seconds: Mapping[str, float] = field(default_factory=dict)


class Validation:
    """A few windows of text on which plans are compared, each with the dense model on the same windows.

    The windows come in two halves. A model that is surely worse than one of its rivals on the first is not run on the second.

    Args:
        windows: int64 (windows, length), an even number of windows or one.
        dense: the dense model's mean negative log likelihood of each.
    """

    def __init__(self, windows: torch.Tensor, dense: Sequence[float]) -> None:
        self.windows, self.dense = windows, tuple(dense)
        self.dense_perplexity = _perplexity(self.dense)

    def __call__(self, model: Any, rivals: Sequence[Sequence[float]] = ()) -> Judgement:
        """Judge a model; `rivals` are the window losses of models that were judged on all windows."""
        half = len(self.windows) // 2
        first: list[float] = []
        if half >= _FEWEST_WINDOWS and rivals:
            first = negative_log_likelihood(model, self.windows[:half]).tolist()
            rival = min(rivals, key=sum)
            differences = torch.tensor(first, dtype=torch.float64) - torch.tensor(rival[:half], dtype=torch.float64)
            mean = float(differences.mean())
            if not mean <= _STANDARD_ERRORS * float(differences.std()) / math.sqrt(half):  # written so that a NaN stops
                return Judgement(_perplexity([mean + sum(rival) / len(rival)]), tuple(first), complete=False)
        nll = (*first, *negative_log_likelihood(model, self.windows[len(first) :]).tolist())
        return Judgement(_perplexity(nll), nll)

    def standard_error(self, nll: Sequence[float]) -> float:
        """Return the standard error of log(perplexity / dense perplexity), in nats, if the windows were drawn at random."""
        differences = torch.tensor(nll, dtype=torch.float64) - torch.tensor(self.dense, dtype=torch.float64)
        return float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else math.nan


def _perplexity(nll: Sequence[float]) -> float:
    mean = sum(nll) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf


def representative(differences: Sequence[float], count: int) -> list[int]:
    """Choose windows whose mean difference between two models is close to that of all windows, by stratified sampling.

    The windows are sorted by their difference and cut into `count` strata; each gives the one closest to its mean. The first half
    of the result is balanced as well: pairs of strata from the outside and from the inside take turns.

    Args:
        differences: of each window's loss, in nats.
        count: how many to choose; all where there are no more.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    if count >= len(values):
        return list(range(len(values)))
    strata = values.argsort().tensor_split(count)
    chosen = [int(s[(values[s] - values[s].mean()).abs().argmin()]) for s in strata]
    pairs = [(chosen[i], chosen[-1 - i]) for i in range(count // 2)]
    inwards = sorted(range(len(pairs)), key=lambda i: min(2 * i, 2 * (len(pairs) - 1 - i) + 1))  # outermost, innermost, ...
    return [index for i in inwards for index in pairs[i]] + chosen[count // 2 : count // 2 + count % 2]


class Divergence:
    """Mean per-token KL divergence, in nats, of a changed model from the dense one on a few windows.

    Memory: the dense probabilities, 4 bytes x tokens x vocabulary, and the states before each block. A model that is changed
    from block i on is run from there.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self._layers = model.get_submodule(family_of(model.config).layers)
        self._windows = windows
        self._before: list[torch.Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: self._before.append(inputs[0])) for layer in self._layers]
        try:
            hidden = _hidden(model, windows).flatten(0, 1)
        finally:
            for hook in hooks:
                hook.remove()
        self._probabilities = [logits_of(model, h).softmax(-1) for h in torch.split(hidden, LOGIT_ROWS)]
        self._negative_entropy = sum(float(torch.special.entr(p).sum()) for p in self._probabilities) * -1

    @torch.inference_mode()
    def __call__(self, model: Any, first_changed: int = 0) -> float:
        """Return KL(dense || model); no block before `first_changed` may differ from the dense model's."""
        states = self._before[first_changed]
        hook = self._layers[first_changed].register_forward_pre_hook(lambda _, inputs: (states, *inputs[1:]))
        try:  # not by inputs_embeds: Granite multiplies those
            with replaced(self._layers, [PassThrough(layer) for layer in self._layers[:first_changed]]):
                hidden = _hidden(model, self._windows).flatten(0, 1)
        finally:
            hook.remove()
        total = self._negative_entropy
        for p, h in zip(self._probabilities, torch.split(hidden, LOGIT_ROWS), strict=True):
            logits = logits_of(model, h)
            total += float(logits.logsumexp(-1).double().sum() - (p * logits).sum(-1).double().sum())
        return total / len(hidden)


class Reference:
    """The dense model on held-out windows, for judging others on them; `nll` is its mean negative log likelihood per token, nats.

    Memory: the dense model's last hidden states; the output layer is taken to be the same in every model.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self._windows = windows
        self._hidden = [_hidden(model, part)[:, :-1].flatten(0, 1) for part in self._batches()]
        self.nll = self(model)["nll"]

    def _batches(self) -> Iterator[torch.Tensor]:
        yield from torch.split(self._windows, max(1, _BATCH_TOKENS // self._windows.shape[1]))

    @torch.inference_mode()
    def __call__(self, model: Any) -> dict[str, float]:
        """Return `nll`, and `divergence`: KL(dense || model) per token, in nats."""
        nll = divergence = 0.0
        for part, dense in zip(self._batches(), self._hidden, strict=True):
            hidden = _hidden(model, part)[:, :-1].flatten(0, 1)
            targets = part[:, 1:].flatten().to(hidden.device)
            for h, d, t in zip(*(torch.split(x, LOGIT_ROWS) for x in (hidden, dense, targets)), strict=True):
                found, wanted = logits_of(model, h).log_softmax(-1), logits_of(model, d).log_softmax(-1)
                nll -= float(found.gather(1, t[:, None]).double().sum())
                divergence += float((wanted.exp() * (wanted - found)).double().sum())
        tokens = sum(len(hidden) for hidden in self._hidden)
        return {"nll": nll / tokens, "divergence": divergence / tokens}
