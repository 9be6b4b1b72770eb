"""Table 2, IATV: identity-aware textual-visual matching with latent co-attention (Li et al. 2017), in two stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.models import Terms
from dmvae_lib.models.base import Batch
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.networks import trim
from dmvae_lib.paper.rows.joint_embedding import LSTMEmbedding, class_index, sizes_and_classes, sorted_classes

MATCH_DIM = 128  # of stage 2


class CoAttention(nn.Module):
    """Image features (I, d) and token embeddings (J, T, D) -> what stage 2 finds in each pair, (I, J).

    The image attends to the words of the caption, a_t ~ exp(v . w_t / sqrt(dim)), and a network of one hidden layer
    judges the product of v and the attended words, sum_t a_t w_t.
    """

    def __init__(self, image_dim: int, token_dim: int, dim: int):
        super().__init__()
        self.image, self.words = nn.Linear(image_dim, dim), nn.Linear(token_dim, dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        tokens, mask = trim(tokens)
        image, words = self.image(image), self.words(tokens)
        affinity = torch.einsum("id,jtd->ijt", image, words) / math.sqrt(image.shape[-1])
        attention = affinity.masked_fill(~mask, -torch.inf).softmax(-1)
        return self.head(image[:, None] * torch.einsum("ijt,jtd->ijd", attention, words))[..., 0]


class IATV(LSTMEmbedding):
    """Stage 1 embeds by the cross-modal cross-entropy; stage 2 judges pairs, and re-ranks stage 1's top hits.

    Stage 1, with unit embeddings v, t and a memory of one unit vector per training class and modality, V_k and T_k:

        p(k | v) ~ exp(v . T_k / temperature),   p(k | t) ~ exp(t . V_k / temperature),   loss -log p(class).

    Stage 2 has the logit  scale * v . t + `CoAttention`, v . t held constant; binary cross-entropy of a batch's pairs
    against, for every image and every caption, the partner of another class that stage 1 finds most similar.

    Simplified: an image has one pooled feature, so that the paper's attention over regions and its alignment of latent
    word groups are left out; co-attention reads the token embeddings; stage 2 corrects the cosine of stage 1, both
    trained in one step, where the paper's starts from stage 1's trained networks; memories hold the mean of a class
    over the last batch it was in.

    classes: the labels that occur in training.
    """

    def __init__(self, image_dim: int, token_dim: int, classes: Sequence[int], dim: int, temperature: float):
        super().__init__(image_dim, token_dim, dim)
        self.co_attention = CoAttention(image_dim, token_dim, MATCH_DIM)
        self.temperature = temperature
        self.scale = nn.Parameter(torch.tensor(1 / temperature))
        self.register_buffer("classes", sorted_classes(classes))
        for memory in ("image_memory", "text_memory"):
            self.register_buffer(memory, torch.zeros(len(self.classes), dim))

    def match(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Stage 2's logits (I, J) that image i (I, d_image) and caption j (J, T, D) are of one class."""
        v, t = (F.normalize(x, dim=-1) for x in (self.embed_image(image), self.embed_text(tokens)))
        return self.scale * (v @ t.T) + self.co_attention(image, tokens)

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """Terms "identity(image)" and "identity(text)" of stage 1, "match" of stage 2. Training renews the memories."""
        image, text = (F.normalize(embedding, dim=-1) for embedding in self.embed(batch, labels))
        index, cosine = class_index(self.classes, labels), (image @ text.T).detach()
        match = self.scale * cosine + self.co_attention(batch["image"], batch["text"])
        # clones: the memories change below, before the backward pass has read them
        terms = {
            "identity(image)": F.cross_entropy(image @ self.text_memory.clone().T / self.temperature, index),
            "identity(text)": F.cross_entropy(text @ self.image_memory.clone().T / self.temperature, index),
            "match": pair_loss(match, cosine, labels),
        }
        if self.training:
            remember(self.image_memory, image.detach(), index)
            remember(self.text_memory, text.detach(), index)
        return Terms(others=terms)


def remember(memory: Tensor, features: Tensor, index: Tensor) -> None:
    """memory (C, d): the row of every class in `index`, (B,), becomes the direction of its mean feature, (B, d)."""
    sums = torch.zeros_like(memory).index_add_(0, index, features)
    present = torch.zeros(len(memory), dtype=torch.bool, device=memory.device).index_fill_(0, index, True)
    memory.copy_(torch.where(present[:, None], F.normalize(sums, dim=-1), memory))


def pair_loss(logits: Tensor, cosine: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy: the mean over the pairs (m, m), plus the mean over every image's hardest caption and
    every caption's hardest image, by cosine, of another class; logits[m, n], cosine[m, n]: of image m and caption n.
    """
    different = labels[:, None] != labels[None, :]
    hardest = cosine.masked_fill(~different, -torch.inf)
    negatives = torch.cat([logits.gather(d, hardest.argmax(d, keepdim=True)).flatten() for d in (1, 0)])
    exists = different.any(1).repeat(2)  # none in a batch of one class
    return F.softplus(-logits.diagonal()).mean() + (F.softplus(negatives) * exists).sum() / exists.sum().clamp_min(1)


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, temperature: float) -> IATV:
    return IATV(*sizes_and_classes(splits), retrieval_hidden, temperature)
