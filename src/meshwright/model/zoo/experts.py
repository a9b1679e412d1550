"""Mixtures of experts with everything that families vary in them: how experts are scored, grouped
and weighted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.model.config import LanguageModel
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.spec import Mixture
from meshwright.model.zoo.activations import ACTIVATIONS
from meshwright.model.zoo.mixtral import GroupedLinear
from meshwright.model.zoo.modules import Linear


class ConfiguredExperts(nn.Module):
    """Routes each token to `chosen` of the gated experts, as the model's Mixture says."""

    def __init__(self, c: LanguageModel) -> None:
        super().__init__()
        mixture = architecture_of(c).mixture
        assert mixture is not None
        self.mixture: Mixture = mixture
        self.experts, self.chosen = c.experts, c.chosen
        self.activation = architecture_of(c).activation
        self.router = Linear(c.width, c.experts, bias=False)
        self.gate_up = GroupedLinear(c.experts, c.width, 2 * c.hidden)
        self.down = GroupedLinear(c.experts, c.hidden, c.width)
        self.balance: Tensor | None
        self.register_buffer("balance", torch.zeros(c.experts) if self.mixture.balanced else None)

    def reset_parameters(self) -> None:
        """Sets the balancing bias to 0; the parameters belong to submodules."""
        if self.balance is not None:
            self.balance.zero_()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        expert, share = self._routed(self.router(flat))
        order = expert.flatten().argsort(stable=True)
        ids = torch.arange(self.experts, device=x.device)
        counts = (expert.flatten() == ids[:, None]).sum(dim=1)
        gate, up = self.gate_up(flat[order // self.chosen], counts).chunk(2, dim=-1)
        y = self.down(ACTIVATIONS[self.activation](gate) * up, counts)
        back = y[order.argsort()].view(-1, self.chosen, y.shape[-1])
        return torch.sum(back * share.to(y.dtype)[..., None], dim=1).view(x.shape)

    def _routed(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gives each token's experts and the weights of their outputs, both (tokens, chosen)."""
        m = self.mixture
        exact = torch.promote_types(torch.float32, logits.dtype)
        if m.score == "softmax" and m.normalised and m.groups == 1:
            best, expert = logits.topk(self.chosen, dim=-1)
            share = best.softmax(dim=-1, dtype=exact)
        else:
            logits = logits.to(exact)
            scores = logits.softmax(dim=-1) if m.score == "softmax" else logits.sigmoid()
            expert = self._looked_at(scores.detach()).topk(self.chosen, dim=-1).indices
            share = scores.gather(1, expert)
            if m.normalised:
                share = share / (share.sum(dim=-1, keepdim=True) + 1e-20)
        return expert, share if m.scale == 1.0 else share * m.scale

    def _looked_at(self, scores: Tensor) -> Tensor:
        """Gives the scores by which experts are chosen: those of experts in groups that were not
        chosen become minus infinity."""
        m = self.mixture
        if self.balance is not None:
            scores = scores + self.balance
        if m.groups == 1:
            return scores
        grouped = scores.view(*scores.shape[:-1], m.groups, -1)
        if m.group_score == "best":
            of_group = grouped.amax(dim=-1)
        else:
            of_group = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = of_group.topk(m.groups_chosen, dim=-1).indices
        seen = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, best, True)
        return grouped.masked_fill(~seen[..., None], float("-inf")).flatten(1)
