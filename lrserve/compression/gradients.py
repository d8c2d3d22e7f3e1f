"""Second moments of the loss gradient around each fused group, for two-sided factorization (factorize.py).

Notation
    x (t, n), y (t, m)   a group's input and output for t tokens
    g                    gradient of the tokens' summed cross entropy by x or y, for labels drawn from the model itself
    K (n, n), Gamma^2 (m, m)   E[g g^T] of an input and of an output gradient;  K = W^T Gamma^2 W, whatever linears the group has

    w (t,)               |g|^2 of a group's outputs, all its linears' together: how much the loss feels of each token

With such labels E[g g^T] is the group's block of the Fisher matrix of KL(dense || compressed), not only an empirical stand-in
(Kunstner et al., arXiv 1905.12558, section 3). One backward pass gives every group at once; no gradient of a weight is formed.

Memory: the model, the activations of one batch, and 4 bytes per entry of every group's moment and for each token and group. Where
that is too much, the moments are pages of files, and activations are computed again on the way back.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lrserve.compression.covariance import Triangle, exact_products, triangle_size
from lrserve.compression.factorize import Side
from lrserve.compression.filed import IN_MEMORY, Filed
from lrserve.compression.groups import Group
from lrserve.compression.logits import LOGIT_ROWS, logits_of
from lrserve.compression.recompute import recomputed
from lrserve.errors import CalibrationError
from lrserve.storage.store import write_tensors

_FILE = "moments.safetensors"
_TOKENS, _OUTPUTS = "tokens", "outputs"
_SAVED_TOKENS = 8192  # between two saves of the running sums: what an interruption costs


def gradient_side(group: Group) -> Side:
    """Say on which side of a group's weight the gradient is taken: the narrower, or the input's where several linears share it."""
    return "output" if len(group.members) == 1 and group.m < group.n else "input"


def _width(group: Group) -> int:
    return group.m if gradient_side(group) == "output" else group.n


class _Moment:
    """Sum of g g^T over the tokens seen, of which the triangle is kept."""

    def __init__(self, width: int, device: torch.device, start: torch.Tensor | None, filed: Filed) -> None:
        values = torch.zeros(triangle_size(width), device=device) if start is None else start.to(device)
        self.sum = Triangle(width, filed(values))
        self._watched: weakref.ref[torch.Tensor] | None = None

    def watch(self, model: Any, group: Group) -> Any:
        """Hook into the forward pass; returns the handle."""
        module = model.get_submodule(group.members[0])
        if gradient_side(group) == "output":
            return module.register_forward_hook(lambda _, inputs, output: self._take(output))
        return module.register_forward_pre_hook(lambda _, inputs: self._take(inputs[0]))

    def _take(self, tensor: torch.Tensor) -> None:
        # a block that computes again is given its input, perhaps the group's own, a second time
        known = self._watched is not None and self._watched() is tensor
        if tensor.requires_grad and not known:
            tensor.register_hook(self._add)
            self._watched = weakref.ref(tensor)

    def _add(self, gradient: torch.Tensor) -> None:
        g = gradient.detach().flatten(0, -2)
        with exact_products(g):
            self.sum.add_products(g.float())


class _Powers:
    """Sums of g^2 by the outputs of a group: for every token (windows, length) over the outputs, for every output (m,) over tokens.

    A batch adds to the windows that it begins at.
    """

    def __init__(
        self,
        group: Group,
        windows: torch.Tensor,
        device: torch.device,
        tokens: torch.Tensor | None,
        outputs: torch.Tensor | None,
    ) -> None:
        self.tokens = torch.zeros(windows.shape, device=device)
        if tokens is not None:
            self.tokens[: len(tokens)] = tokens.to(device)
        self.outputs = torch.zeros(group.m, device=device) if outputs is None else outputs.to(device)
        self.first = 0
        self._rows = dict(zip(group.members, self.outputs.split(list(group.out_features)), strict=True))

    def watch(self, model: Any, member: str) -> Any:
        """Hook into a linear's forward pass; returns the handle."""
        return model.get_submodule(member).register_forward_hook(lambda _, inputs, output: self._take(output, member))

    def _take(self, output: torch.Tensor, member: str) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(gradient, member))

    def _add(self, gradient: torch.Tensor, member: str) -> None:
        powers = gradient.detach().float().square()
        self.tokens[self.first : self.first + len(powers)] += powers.sum(-1)
        self._rows[member].add_(powers.flatten(0, -2).sum(0))


def collect_gradients(
    model: Any,
    groups: Sequence[Group],
    windows: torch.Tensor,
    folder: Path,
    *,
    batch_tokens: int,
    seed: int,
    first: int = 0,
    recompute: bool = False,
    filed: Filed = IN_MEMORY,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Collect every group's gradient moment into `folder`; resumes where it last saved.

    Args:
        model: a dense causal LM of a known family; its parameters' `requires_grad` is switched off.
        groups: the groups to watch.
        windows: calibration tokens, int64 (sequences, length).
        folder: private to these inputs.
        batch_tokens: tokens in one forward and backward pass, rounded down to whole sequences.
        seed: of the labels, which depend on the batches too.
        first: index of the first of the windows among those of which several passes each see some, whole batches; what they leave
            is for `merge_gradients`, and the labels are those of one pass over all.
        recompute: keep only the states between blocks for the way back; the moments are the same.
        filed: where the moments are until they are published.
        progress: called with the number of windows that are done.

    Returns:
        The number of windows that were reused from an earlier, interrupted pass.

    Raises:
        CalibrationError: hidden states or gradients that are not finite, or not enough memory on the device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    length = windows.shape[1]
    batch = max(1, batch_tokens // length)
    path = folder / _FILE
    reused, saved = windows_done(folder), {}
    progress(reused)
    if reused >= len(windows):
        return reused
    if reused:
        saved = load_file(path)
    moments = {group.name: _Moment(_width(group), device, saved.pop(group.name, None), filed) for group in groups}
    powers = {
        group.name: _Powers(group, windows, device, saved.get(f"{group.name}.{_TOKENS}"), saved.get(f"{group.name}.{_OUTPUTS}"))
        for group in groups
    }
    published = reused
    with ExitStack() as hooks:
        hooks.enter_context(recomputed(model, recompute))
        for group in groups:
            hooks.callback(moments[group.name].watch(model, group).remove)
            for member in group.members:
                hooks.callback(powers[group.name].watch(model, member).remove)
        for start in range(reused, len(windows), batch):
            done = min(start + batch, len(windows))
            for power in powers.values():
                power.first = start
            try:
                _backward(model, windows[start:done].to(device), seed * 1_000_003 + first + start)
            except torch.OutOfMemoryError as error:
                raise CalibrationError(
                    f"the backward passes do not fit in the device's memory ({error}); lower calibration.batch_tokens, or set "
                    "factorization.fisher to [] to go without them"
                ) from None
            if (done - published) * length >= _SAVED_TOKENS or done == len(windows):
                sums = [moment.sum.values for moment in moments.values()]
                sums += [tensor for power in powers.values() for tensor in (power.tokens, power.outputs)]
                if not all(torch.isfinite(tensor).all() for tensor in sums):
                    raise CalibrationError(
                        "a gradient is not finite; calibrate in bfloat16 or float32, or set factorization.fisher to []"
                    )
                metadata = {"windows": str(done), "tokens": str(done * length)}
                tensors = {name: moment.sum.values.cpu() for name, moment in moments.items()}
                tensors |= {f"{name}.{_TOKENS}": power.tokens[:done].cpu().contiguous() for name, power in powers.items()}
                tensors |= {f"{name}.{_OUTPUTS}": power.outputs.cpu() for name, power in powers.items()}
                write_tensors(path, tensors, metadata)
                published = done
            progress(done)
    return reused


def merge_gradients(parts: Sequence[Path], folder: Path) -> None:
    """Merge the moments of passes over disjoint windows, of the folders `parts` in the order of the windows, into `folder`.

    They are those of one pass over all windows, but for the order in which float32 numbers are added.
    """
    merged: dict[str, torch.Tensor] = {}
    counts = Counter[str]()
    for part in parts:
        path = part / _FILE
        with safe_open(path, framework="pt") as file:
            counts.update({key: int(value) for key, value in file.metadata().items()})
        for name, tensor in load_file(path).items():
            if name not in merged:
                merged[name] = tensor
            elif name.endswith(f".{_TOKENS}"):
                merged[name] = torch.cat([merged[name], tensor])
            else:
                merged[name] += tensor
    write_tensors(folder / _FILE, merged, {key: str(value) for key, value in counts.items()})


def windows_done(folder: Path) -> int:
    """Return how many windows the moments in a folder are of."""
    path = folder / _FILE
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["windows"])


@torch.enable_grad()
def _backward(model: Any, windows: torch.Tensor, seed: int) -> None:
    """Run one batch forwards, draw a label for each token, and run backwards from the summed cross entropy."""
    generator = torch.Generator(windows.device).manual_seed(seed)
    embedded = model.get_input_embeddings()(windows).detach().requires_grad_(True)
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    if not torch.isfinite(hidden).all():
        raise CalibrationError(
            "the model's hidden states are not finite; check the checkpoint, or calibrate in bfloat16 or float32"
        )
    gradients: list[torch.Tensor] = []
    for rows in torch.split(hidden.detach().flatten(0, 1), LOGIT_ROWS):
        h = rows.requires_grad_(True)
        logits = logits_of(model, h)
        probabilities = logits.detach().softmax(-1)
        if not torch.isfinite(probabilities).all():
            raise CalibrationError("the model's logits are not finite; calibrate in bfloat16 or float32 (engine.dtype)")
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients += torch.autograd.grad(loss, h)
    hidden.backward(torch.cat(gradients).view_as(hidden))


class GradientStore:
    """Reads moments back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / _FILE
        if not self._path.is_file():
            raise CalibrationError(f"{folder} holds no gradients: their collection did not finish; run the same command again")

    def read(self, group: Group) -> tuple[Side, torch.Tensor]:
        """Return a group's side and moment per token, float64."""
        with safe_open(self._path, framework="pt") as file:
            total = Triangle(_width(group), file.get_tensor(group.name)).matrix()
            return gradient_side(group), total.double().div_(int(file.metadata()["tokens"]))

    def token_weights(self, group: Group) -> torch.Tensor:
        """Return w (windows, length) of the tokens that gradients were collected on, over its mean."""
        with safe_open(self._path, framework="pt") as file:
            power = file.get_tensor(f"{group.name}.{_TOKENS}")
        mean = power.mean()
        return power / mean if mean > 0 else torch.ones_like(power)

    def outputs(self, group: Group) -> torch.Tensor:
        """Return Gamma^2 (m, m) per token, float64; its diagonal (m,) where the moment is on the input's side."""
        side, moment = self.read(group)
        if side == "output":
            return moment
        with safe_open(self._path, framework="pt") as file:
            powers: torch.Tensor = file.get_tensor(f"{group.name}.{_OUTPUTS}")
            return powers.double() / int(file.metadata()["tokens"])
