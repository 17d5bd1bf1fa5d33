"""RLMRec: a graph model whose users and items are aligned with profiles of them in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from recbole_llm.data.profiles import profile_source
from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.edges import Edges
from recbole_llm.model.graph import MeanOfPowers, normalised_adjacency
from recbole_llm.model.lightgcn import LightGCN
from recbole_llm.model.standardise import standardised
from recbole_llm.model.text_contrast import projector

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

# How a language model writes profiles.
_WRITING = ("profile_words", "profile_new_tokens", "profile_batch_size")
_BEFORE = ("item_profiles", "user_profiles", "item_texts", "user_texts")


class RLMRec(LightGCN):
    """What both ways of RLMRec (Ren et al., WWW 2024, arXiv 2310.15950) share: LightGCN, and profiles by node.

    A profile says in words what a user likes, or who likes an item; it is written from train rows (items first, then
    users from the profiles of items that they had) and read by a language model into a vector. Nodes are users before
    items, as in the graph.

    As in the authors' code, the two layers between the widths are as wide as the mean of both, with a leaky ReLU, and
    edges are dropped in training. Where it differs from the paper's models: the base is LightGCN as it is here (the
    mean of its layers, an L2 norm of the batch's tables alone, 64 wide); an edge is dropped in both directions, and the
    others weigh as much more; profiles are written and read by the run's language model (``llm``) in place of GPT-3.5
    and text-embedding-ada-002, and their vectors are centred and scaled, those of users and of items each by their own,
    as mean states lie close together; a node without a profile has no part in the term.

    Args:
        config: has ``text_weight``, ``text_tau``, ``projector``, ``drop_ratio`` and what LightGCN has.
        dataset: the train rows.
    """

    profiles: torch.Tensor
    profiled: torch.Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.text_weight, self.text_tau = config["text_weight"], config["text_tau"]
        self._kind = config["projector"]
        self.drop_ratio = config["drop_ratio"]
        pairs = self.interaction_matrix
        adjacency = normalised_adjacency(pairs.row, pairs.col, self.n_users, self.n_items)
        self.edges = Edges.of(adjacency, self.n_users).to(self.device)

    @classmethod
    def idle_settings(cls, config: Any) -> tuple[str, ...]:
        """Settings that mean nothing as the others stand: how profiles are written, where nothing writes them."""
        return () if profile_source(config) == "generated" else _WRITING

    def _convolve(self, nodes: torch.Tensor) -> torch.Tensor:
        """LightGCN's, in training over a graph without some of its edges, the same ones at every layer."""
        if not self.training or not self.drop_ratio:
            return super()._convolve(nodes)
        kept = self.edges.thinned(self.norm_adj_matrix, self.drop_ratio)
        return MeanOfPowers.apply(kept, nodes, self.n_layers)

    def take_profiles(
        self, users: torch.Tensor, items: torch.Tensor, users_told: torch.Tensor, items_told: torch.Tensor
    ) -> None:
        """Take in what the language model makes of the profiles, and build the layers between the widths.

        Args:
            users: float ``[n_users, H]``, by internal id.
            items: float ``[n_items, H]``, likewise.
            users_told: bool ``[n_users]``, which users have a profile.
            items_told: bool ``[n_items]``, likewise.
        """
        vectors = torch.cat((standardised(users, users_told), standardised(items, items_told)))
        buffers = {"profiles": vectors, "profiled": torch.cat((users_told, items_told))}
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)
        self.profile_mlp = projector(self._kind, *self._widths(vectors.shape[1]))
        for layer in self.profile_mlp.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        self.to(self.device)

    def _widths(self, profile: int) -> tuple[int, int]:
        """What the layers take, and what they give, for profiles of this width."""
        raise NotImplementedError


class RLMRecCon(RLMRec):
    r"""RLMRec-Con: a user's and an item's final embedding is drawn to its projected profile.

    .. math:: L = L_\mathrm{LightGCN} + \frac{\lambda}{B} \sum_{b=1}^{B} \big[ \ell(u_b; \mathrm{all\ users}) +
        \ell(i_b; \mathrm{items\ of\ the\ batch}) + \ell(n_b; \mathrm{negatives\ of\ the\ batch}) \big]

    with :math:`\ell(x; Y) = -\log \big( \exp(\cos(e_x, f(p_x)) / \tau) / \sum_{y \in Y} \exp(\cos(e_x, f(p_y)) / \tau)
    \big)` and :math:`f` from the profiles' width H to the embeddings' d. Rows of a batch that name the same item stand
    there as often as they do, as in the authors' code.
    """

    stages = (*_BEFORE, "train-RLMRecCon")

    def _widths(self, profile: int) -> tuple[int, int]:
        return profile, self.latent_dim

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """LightGCN's loss and the weighted contrast with the profiles.

        Args:
            interaction: RecBole's pairwise batch: user, item and negative item ids, each ``[B]``.

        Returns:
            The loss, ``[1]``.
        """
        loss, nodes = self.loss_and_nodes(interaction)
        if self.text_weight:
            loss = loss + self.text_weight * self.profile_loss(nodes, interaction)
        return loss

    def profile_loss(self, nodes: torch.Tensor, interaction: Interaction) -> torch.Tensor:
        """The three contrasts, a row of the batch.

        Args:
            nodes: ``[n_users + n_items, d]``, final embeddings.
            interaction: the batch.

        Returns:
            A scalar; zero where no row of the batch has a profile.
        """
        users = self.profiled[: self.n_users].nonzero().flatten()
        total = self._term(nodes, interaction[self.USER_ID], users)
        for field in (self.ITEM_ID, self.NEG_ITEM_ID):
            total = total + self._term(nodes, interaction[field] + self.n_users)
        return total / len(interaction[self.USER_ID])

    def _term(self, nodes: torch.Tensor, rows: torch.Tensor, pool: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of the rows' contrasts with their own profile among others.

        Args:
            nodes: see :meth:`profile_loss`.
            rows: int64 ``[B]``, nodes.
            pool: int64, sorted nodes that have a profile, whose profiles are told apart; those of the rows if ``None``.
        """
        # Nodes that stand there several times have one and the same term: it is computed once.
        nodes_of, counts = rows[self.profiled[rows]].unique(return_counts=True)
        if not len(nodes_of):
            return nodes.new_zeros(())
        with torch.autocast(nodes.device.type, enabled=False):
            counts = counts.to(nodes.dtype)
            among = nodes_of if pool is None else pool
            said = F.normalize(self.profile_mlp(self.profiles[among]))
            own, often = (None, counts) if pool is None else (torch.searchsorted(pool, nodes_of), None)
            met = F.normalize(nodes.index_select(0, nodes_of))
            loss: torch.Tensor = InfoNCE.apply(met, said, self.text_tau, own, counts, often)
        return loss * counts.sum()


class RLMRecGen(RLMRec):
    r"""RLMRec-Gen: profiles of masked nodes are made again from what the graph says of them.

    A share of the nodes stands below the graph as one learned token, in the loss of the pairs as well; what comes out
    for them, taken to the profiles' width, is to be nearest to their own profile among those of all masked nodes:

    .. math:: L = L_\mathrm{LightGCN}(\mathrm{masked}) + \lambda \, \mathrm{InfoNCE}(g(e_m), p_m; \tau)

    Nothing is masked when items are ranked, nor where the weight is 0. Ours: nodes are masked among those that have a
    profile. The token begins as zeros, as in the authors' code.

    Args:
        config: has ``mask_ratio`` besides.
        dataset: the train rows.
    """

    stages = (*_BEFORE, "train-RLMRecGen")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.mask_ratio = config["mask_ratio"]
        self.mask_token = nn.Parameter(torch.zeros(1, self.latent_dim))

    def _widths(self, profile: int) -> tuple[int, int]:
        return self.latent_dim, profile

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """LightGCN's loss over a graph with masked nodes, and the weighted contrast of what is made of them.

        Args:
            interaction: RecBole's pairwise batch: user, item and negative item ids, each ``[B]``.

        Returns:
            The loss, ``[1]``.
        """
        masked = self._draw() if self.text_weight else None
        if masked is None or not len(masked):
            return self.loss_and_nodes(interaction)[0]
        below = self.get_ego_embeddings().index_copy(0, masked, self.mask_token.expand(len(masked), -1))
        loss, nodes = self.loss_and_nodes(interaction, below)
        return loss + self.text_weight * self.profile_loss(nodes, masked)

    def _draw(self) -> torch.Tensor:
        """Nodes to mask, int64: the share of those that have a profile, at least one, without repeats."""
        told = self.profiled.nonzero().flatten()
        count = max(int(len(told) * self.mask_ratio), 1)
        return told[torch.randperm(len(told), device=told.device)[:count]]

    def profile_loss(self, nodes: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """InfoNCE of what is made of masked nodes with their profiles.

        Args:
            nodes: ``[n_users + n_items, d]``, final embeddings.
            masked: int64 ``[n]``, at least one.

        Returns:
            A scalar.
        """
        with torch.autocast(nodes.device.type, enabled=False):
            made = F.normalize(self.profile_mlp(nodes.index_select(0, masked)))
            loss: torch.Tensor = InfoNCE.apply(made, F.normalize(self.profiles[masked]), self.text_tau)
        return loss
