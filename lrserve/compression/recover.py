"""Recovery: distilling the dense model into the compressed one; ranks and integers, and so the export and its speed, stay.

The student is the dense model with trainable factors (training.py) or, where weights are rounded, the compressed model with what
can be trained of it (repair.py). The loss is KL(teacher || student) per token, on calibration text that neither the search's
validation nor the report sees. Three economies make minutes count:
- Windows are short (`LENGTH`): attention and its backward pass are a third of the cost at 512 tokens, and little of what
  compression broke is far away.
- The output layer, a fifth of a small model, runs on every second token only: its gradient is formed in closed form from
  both models' probabilities, row block by row block, so the vocabulary is never in memory for a whole batch.
- The learning rate falls with what is left of the budget, minutes or tokens, so the last state is always the one to take.

Text counts as well as minutes: what a second pass over the same windows gains on them is not seen on other text (docs/methods.md).

With minutes for a budget the machine decides how many steps are taken. With tokens, steps and learning rates are the same
everywhere; so are, with both, the order of the text and the tokens drawn. Several processes (team.py) share the windows of each
step, and perhaps the models (sharding.py): gradients are sums over tokens, so the steps are those of one process.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lrserve.compression.factorize import FactorSource
from lrserve.compression.groups import Group
from lrserve.compression.logits import logits_of
from lrserve.compression.recompute import recompute_blocks
from lrserve.compression.sharding import divided_as, shard, whole
from lrserve.compression.team import ALONE, Team
from lrserve.compression.training import TrainedFactors, install_trainable
from lrserve.errors import NotFiniteError
from lrserve.storage.store import atomic_path, write_tensors

LENGTH: Final = 256
"""Tokens per window."""
_TOKEN_SHARE: Final = 0.5  # of the tokens whose loss is formed
_LEARNING_RATE: Final = 1.5e-4
_BETAS: Final = (0.9, 0.95)
_WARMUP_STEPS: Final = 8
_FLOOR: Final = 0.02  # of the learning rate
_ROWS: Final = 256  # tokens whose logits, of both models, are in memory at once
_CACHED_ROWS: Final = 16  # tokens whose probabilities are formed at once
_SAVE_SECONDS: Final = 120.0
_FINISHED: Final = "factors.safetensors"
_STATE: Final = "state.pt"
_AVERAGED: Final = 20  # steps whose divergence is averaged for the outcome


@dataclass(frozen=True)
class Schedule:
    """How long to train, and in which portions.

    seconds, tokens: the budget, one of them; the other is 0.
    batch_tokens: of a step.
    pass_tokens: of one forward and backward pass; a step takes as many passes as it needs.
    recompute: keep only the states between blocks for the backward pass, and compute all others anew there.
    """

    seconds: float = 0.0
    tokens: int = 0
    batch_tokens: int = 2048
    pass_tokens: int = 4096
    recompute: bool = False

    @property
    def budget(self) -> float:
        """Seconds or tokens to spend."""
        return self.tokens or self.seconds

    def spent(self, state: _Progress) -> float:
        """Return the share of the budget that is spent, 1 at the end."""
        return min(1.0, (state.tokens if self.tokens else state.seconds) / self.budget)


class Student(Protocol):
    """What is trained: a model of which some float32 parameters learn."""

    @property
    def model(self) -> Any:
        """The model that it is, or is computed from."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what learns, by unique names."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was learnt, by unique names."""


class _FactorStudent:
    """A dense model with trainable factors in the place of its factorized linears."""

    def __init__(self, model: Any, ranks: Sequence[tuple[Group, int]], source: FactorSource) -> None:
        self.model = model
        self._trainable = install_trainable(model, ranks, source)

    def parameters(self) -> dict[str, nn.Parameter]:
        named = ((f"{name}.{own}", value) for name, group in self._trainable.items() for own, value in group.named_parameters())
        return {name: value for name, value in named if value.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        return TrainedFactors({name: group.factors() for name, group in self._trainable.items()}).tensors()


class Distilled(NamedTuple):
    """What a student learnt, in how many steps and tokens, and the mean KL divergence in nats over the first and last steps."""

    tensors: dict[str, torch.Tensor]
    steps: int
    tokens: int
    first_divergence: float
    last_divergence: float
    reused: bool


@dataclass(frozen=True)
class Recovered:
    """The improved factors, and the rest as `Distilled` has it."""

    factors: TrainedFactors
    steps: int
    tokens: int
    first_divergence: float
    last_divergence: float
    reused: bool


@dataclass
class _Progress:
    seconds: float = 0.0
    tokens: int = 0
    divergences: list[float] = field(default_factory=list)


def recover(
    teacher: Any,
    load: Callable[[], Any],
    ranks: Sequence[tuple[Group, int]],
    source: FactorSource,
    windows: torch.Tensor,
    folder: Path,
    *,
    schedule: Schedule,
    seed: int,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> Recovered:
    """Train the factors of a plan that rounds nothing.

    Args:
        teacher: the dense model.
        load: returns a second copy of it, whose factorized linears are replaced by trainable factors. It is not called where a
            finished run is found, and in a team that shards the models only when the teacher is divided.
        ranks: the factorized groups and their ranks.
        source: the factors to start from.
        windows, folder, schedule, seed, team, progress: as of `distil`.

    Raises:
        NotFiniteError: the divergence is no longer finite.
    """
    how: dict[str, Any] = {"schedule": schedule, "seed": seed, "team": team, "progress": progress}
    found = distil(teacher, lambda: _FactorStudent(load(), ranks, source), windows, folder, **how)
    return Recovered(TrainedFactors.from_tensors(found.tensors), *found[1:])


def distil(
    teacher: Any,
    make: Callable[[], Student],
    windows: torch.Tensor,
    folder: Path,
    *,
    schedule: Schedule,
    seed: int,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> Distilled:
    """Train a student by a schedule; an interrupted run goes on from its last save, at most two minutes back.

    Args:
        teacher: the dense model.
        make: builds the student, unless a finished run is found.
        windows: calibration tokens, int64 (sequences, length).
        folder: private to these inputs; the processes of a team share it.
        schedule: the budget, in which what an interruption lost does not count, and its portions.
        seed: of the order of the text and of the tokens drawn.
        team: the processes that train together; all are given the same, and have the same result. One that shards divides the
            teacher and the student.
        progress: called with the seconds or tokens that are spent.

    Raises:
        NotFiniteError: the divergence is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / _FINISHED
    if is_finished(folder):
        with safe_open(done, framework="pt") as file:
            outcome = json.loads(file.metadata()["outcome"])
        progress(round(schedule.budget))
        return Distilled(load_file(done), reused=True, **outcome)
    teacher.requires_grad_(False)
    if team.sharded:
        shard(teacher)
    student = make()
    if schedule.recompute:
        recompute_blocks(student.model)
    if team.sharded:
        shard(student.model)
    device, learning = next(teacher.parameters()).device, student.parameters()
    optimizer = torch.optim.AdamW(learning.values(), lr=_LEARNING_RATE, betas=_BETAS, weight_decay=0.0, fused=True)
    state = _Progress()
    checkpoint = folder / _STATE
    if checkpoint.is_file():
        _restore(checkpoint, learning, optimizer, state)
    team.wait()  # all have read it before the first writes the next
    texts = _texts(windows)
    batch = min(max(1, schedule.batch_tokens // texts.shape[1]), len(texts))
    began, saved = time.monotonic() - state.seconds, state.seconds
    with team.signals_held() as signals:
        try:
            while (spent := schedule.spent(state)) < 1:
                step = len(state.divergences)
                rate = min(1.0, (step + 1) / _WARMUP_STEPS) * max(_FLOOR, 1 - spent)
                for group in optimizer.param_groups:
                    group["lr"] = _LEARNING_RATE * rate
                drawn = _batch(texts, step, batch, seed)
                divergence = _accumulate(teacher, student.model, drawn, seed + step, schedule.pass_tokens, team)
                elapsed = time.monotonic() - began if team.index == 0 else 0.0
                team.add_up([common := torch.tensor([divergence, elapsed, len(signals)], dtype=torch.float64, device=device)])
                divergence, elapsed, ending = common.tolist()
                if not math.isfinite(divergence):
                    raise NotFiniteError(
                        f"recovery: the divergence is {divergence} after {step} steps; try bfloat16, or leave --recover out"
                    )
                if not team.sharded:  # whose gradients are added up on the backward pass
                    team.add_up_gradients(learning.values())
                optimizer.step()
                optimizer.zero_grad()
                state.divergences.append(divergence)
                state.seconds, state.tokens = elapsed, state.tokens + drawn.numel()
                progress(round(schedule.budget * schedule.spent(state)))
                if ending:  # after the step, so that all processes end in the same state
                    raise KeyboardInterrupt
                if state.seconds - saved > _SAVE_SECONDS:
                    _save(checkpoint, learning, optimizer, state, team)
                    saved, began = state.seconds, time.monotonic() - state.seconds  # saving is not training
        except (KeyboardInterrupt, SystemExit):
            _save(checkpoint, learning, optimizer, state, team)
            raise
        tensors = student.tensors()
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise NotFiniteError("recovery: a factor is not finite; leave --recover out")
        found = state.divergences
        outcome = {
            "steps": len(found),
            "tokens": state.tokens,
            "first_divergence": _mean(found[:_AVERAGED]),
            "last_divergence": _mean(found[-_AVERAGED:]),
        }
        if team.index == 0:
            write_tensors(done, tensors, {"outcome": json.dumps(outcome)})
            checkpoint.unlink(missing_ok=True)
        team.wait()
        return Distilled(tensors, reused=False, **outcome)


def is_finished(folder: Path) -> bool:
    """Whether `distil` has finished in a folder: it then needs neither the teacher nor the student."""
    return (folder / _FINISHED).is_file()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _texts(windows: torch.Tensor) -> torch.Tensor:
    """Cut windows (sequences, length) into shorter ones; a token that all of them begin with (BOS) begins every piece."""
    if windows.shape[1] <= LENGTH:  # perhaps a map of a file, which is larger than memory
        return windows
    begins = windows[:, :1]
    head = begins[:1] if len(windows) > 1 and bool((begins == begins[0]).all()) else begins[:1, :0]
    body = windows[:, head.shape[1] :]
    length = min(LENGTH - head.shape[1], body.shape[1])
    pieces = body[:, : body.shape[1] // length * length].reshape(-1, length)
    return torch.cat([head.expand(len(pieces), -1), pieces], dim=1)


def _batch(texts: torch.Tensor, step: int, batch: int, seed: int) -> torch.Tensor:
    """Return a step's windows: every text once before any comes again, in another order each time."""
    epoch, index = divmod(step, len(texts) // batch)
    return texts[_order(len(texts), seed * 1_000_003 + epoch)[index * batch : (index + 1) * batch]].long()


@lru_cache(maxsize=1)  # of an epoch
def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def last_hidden_states(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Return what reaches the output layer (windows, length, width) of tokens (windows, length)."""
    states: torch.Tensor = model.base_model(input_ids=windows, use_cache=False).last_hidden_state
    return states


@torch.enable_grad()
def _accumulate(teacher: Any, student: Any, windows: torch.Tensor, seed: int, pass_tokens: int, team: Team) -> float:
    """Add the gradients of this process's part of a step's windows to those of what learns.

    Returns the sum of its tokens' KL divergences, over the number of tokens that all processes together draw.
    """
    length, device = windows.shape[1], next(teacher.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(windows.numel(), generator=generator)[: max(1, int(_TOKEN_SHARE * windows.numel()))]
    total = 0.0
    for own in team.passes(len(windows), max(1, pass_tokens // length)):
        if not own and not team.sharded:
            continue
        part = windows[own.start : own.stop] if own else windows[:1]  # a pass that is only for the others' collectives
        rows = drawn - own.start * length
        rows = rows[(rows >= 0) & (rows < len(own) * length)].to(device)
        total += _backward(teacher, student, part.to(device), rows)
    return total / len(drawn)


def _backward(teacher: Any, student: Any, windows: torch.Tensor, rows: torch.Tensor) -> float:
    """Run some windows (windows, length) forwards and backwards; returns the sum of the KL divergences of their tokens `rows`."""
    with torch.no_grad():
        wanted = last_hidden_states(teacher, windows).flatten(0, 1)
    hidden = last_hidden_states(student, windows).flatten(0, 1)
    gradient = torch.zeros_like(hidden)
    total = 0.0
    for some in torch.split(rows, _ROWS):
        divergence, part = _divergence(teacher, student, wanted[some], hidden.detach()[some])
        total += divergence
        gradient[some] = part  # not over the number of tokens: Adam does not mind, and float16 would lose it
    hidden.backward(gradient)
    return total


def _divergence(teacher: Any, student: Any, wanted: torch.Tensor, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return sum KL(teacher || student) over rows of last hidden states (t, width), and its gradient by the student's."""
    h = hidden.requires_grad_(True)
    logits = logits_of(student, h)
    divergence = 0.0
    with torch.no_grad():
        by_logits = logits.detach()  # overwritten, a few rows at a time, so that each stays in the cache until it is finished
        targets = torch.split(logits_of(teacher, wanted), _CACHED_ROWS)
        for target, found in zip(targets, torch.split(by_logits, _CACHED_ROWS), strict=True):
            log_p, log_q = target.log_softmax(-1), found.log_softmax(-1)
            p = log_p.exp()
            divergence += float((p * (log_p - log_q)).sum())
            torch.sub(log_q.exp_(), p, out=found)
    (gradient,) = torch.autograd.grad(logits, h, by_logits)
    return divergence, gradient


def _save(
    path: Path, learning: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: _Progress, team: Team = ALONE
) -> None:
    """Keep what a run needs to go on, whole, whatever each process of a team has of it; the first one writes it."""
    if team.index and not team.sharded:
        return

    def kept(tensor: torch.Tensor) -> torch.Tensor | None:
        found = whole(tensor.detach())
        return None if team.index else found.cpu()

    saved = optimizer.state_dict()
    saved["state"] = {index: {name: kept(value) for name, value in moments.items()} for index, moments in saved["state"].items()}
    learnt = {name: kept(value) for name, value in learning.items()}
    if team.index:
        return
    with atomic_path(path) as partial, partial.open("wb") as file:
        try:
            torch.save({"learnt": learnt, "optimizer": saved, "progress": asdict(state)}, file)
        except RuntimeError as error:  # at the end of a file that a full disk has cut short
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@torch.no_grad()
def _restore(path: Path, learning: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: _Progress) -> None:
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # of which a process of a team reads its rows
    for name, parameter in learning.items():
        parameter.copy_(divided_as(parameter, saved["learnt"][name]))
    parameters = list(learning.values())
    for index, moments in saved["optimizer"]["state"].items():
        parameter = parameters[index]
        moments.update({name: divided_as(parameter, value) for name, value in moments.items() if value.shape == parameter.shape})
    optimizer.load_state_dict(saved["optimizer"])
    for name, value in saved["progress"].items():
        setattr(state, name, value)
