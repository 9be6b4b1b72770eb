"""Encoders, decoders and judges: DMVAE's own as its authors released them, the others as their first lines say.

Every encoder returns (B, 2 * private_dim + 2 * shared_dim) statistics, mean and log-variance of the private part, then
of the shared one; every decoder takes [private, shared].
`width` scales the hidden layers: 1 is the published network, the `quick` profile uses less. `how` is how the weights
start, as `initialise` takes it. Sources: "the release" is github.com/seqam-lab/DMVAE (mnist_svhn/model.py,
mnist_svhn/classifier.py, util.py), MMVAE's is github.com/iffsid/mmvae (src/models/vae_{mnist,svhn}.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError

INITIALISATIONS: dict[str, tuple[type[nn.Module], ...]] = {  # which layers start as He et al. (2015) propose
    "release": (nn.Linear, nn.Conv2d),
    "kaiming": (nn.Linear, nn.Conv2d, nn.ConvTranspose2d),
    "pytorch": (),
}


def initialise(network: nn.Module, how: str) -> nn.Module:
    """Draws the start of a network that was just made from torch's global generator, and returns the network.

    how: "release" draws weights of linear layers and convolutions Kaiming-uniform, +-sqrt(6 / fan_in), and sets their
    biases to 0; transposed convolutions keep PyTorch's +-1 / sqrt(fan_in) (DMVAE's release, `kaiming_init`: it also
    seeds the generator anew before each layer, which makes equal layers start equal, and which is not done here).
    "kaiming" does the same to transposed convolutions too; "pytorch" leaves everything as PyTorch starts it, as MVAE's
    and MMVAE's authors do. Raises DMVAEError for any other.
    """
    if how not in INITIALISATIONS:
        raise DMVAEError(f"unknown initialisation {how!r}; expected one of {', '.join(INITIALISATIONS)}.")
    for layer in network.modules():
        if isinstance(layer, INITIALISATIONS[how]):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


# --- MNIST and SVHN (Sec. 5.1) --------------------------------------------------------------------------------------


def mnist_encoder(private_dim: int, shared_dim: int, hidden: int = 256, how: str = "release") -> nn.Module:
    """(B, 1, 28, 28) -> 784 -> hidden ReLU -> statistics (release, EncoderA; MMVAE's is the same with 400 hidden)."""
    layers = [nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 2 * (private_dim + shared_dim))]
    return initialise(nn.Sequential(*layers), how)


def mnist_decoder(private_dim: int, shared_dim: int, hidden: int = 256, how: str = "release") -> nn.Module:
    """[private, shared] -> hidden ReLU -> 784 logits, (B, 1, 28, 28) (release, DecoderA; MMVAE's has 400 hidden)."""
    layers = [nn.Linear(private_dim + shared_dim, hidden), nn.ReLU(), nn.Linear(hidden, 784)]
    return initialise(nn.Sequential(*layers, nn.Unflatten(1, (1, 28, 28))), how)


# The SVHN networks of DMVAE keep their weights channels-last, the order in which CPUs and tensor cores compute.


def svhn_encoder(private_dim: int, shared_dim: int, width: float = 1.0, how: str = "release") -> nn.Module:
    """(B, 3, 32, 32) -> bias-free convolutions 32-64-128-256 (4, stride 2) -> 512, dropout 0.1 -> statistics.

    The release's EncoderB, ReLU after every layer but the last.
    """
    *channels, hidden = (round(width * size) for size in (32, 64, 128, 256, 512))
    layers: list[nn.Module] = []
    for i, o in pairwise([3, *channels]):
        layers += [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(4 * channels[-1], hidden), nn.ReLU(), nn.Dropout(0.1)]
    layers += [nn.Linear(hidden, 2 * (private_dim + shared_dim))]
    return initialise(nn.Sequential(*layers), how).to(memory_format=torch.channels_last)


def svhn_decoder(private_dim: int, shared_dim: int, width: float = 1.0, how: str = "release") -> nn.Module:
    """[private, shared] -> 1024 ReLU -> (256, 2, 2) -> bias-free transposed convolutions 128-64-32-3, logits.

    The release's DecoderB, ReLU between the layers; its sigmoid belongs to the likelihood here.
    """
    channels = [*(round(width * c) for c in (256, 128, 64, 32)), 3]
    layers = [nn.Linear(private_dim + shared_dim, 4 * channels[0]), nn.ReLU(), nn.Unflatten(1, (channels[0], 2, 2))]
    for i, o in pairwise(channels):
        layers += [nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.ReLU()]
    return initialise(nn.Sequential(*layers[:-1]), how).to(memory_format=torch.channels_last)


def mmvae_svhn_encoder(latent_dim: int, width: float = 1.0, how: str = "pytorch") -> nn.Module:
    """MMVAE's: (B, 3, 32, 32) -> convolutions 32-64-128 (4, stride 2) -> a 4x4 convolution -> (B, 2 latent_dim).

    Its authors' two last convolutions, to the mean and to the scale's logits, are the two halves of one.
    """
    channels = [3, *(round(width * c) for c in (32, 64, 128))]
    layers: list[nn.Module] = []
    for i, o in pairwise(channels):
        layers += [nn.Conv2d(i, o, 4, 2, 1), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Conv2d(channels[-1], 2 * latent_dim, 4), nn.Flatten()), how)


def mmvae_svhn_decoder(latent_dim: int, width: float = 1.0, how: str = "pytorch") -> nn.Module:
    """MMVAE's: (B, latent_dim) -> (128, 4, 4) -> transposed convolutions 64-32-3 -> means in [0, 1]."""
    channels = [*(round(width * c) for c in (128, 64, 32)), 3]
    layers: list[nn.Module] = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, channels[0], 4)]
    for i, o in pairwise(channels):
        layers += [nn.ReLU(), nn.ConvTranspose2d(i, o, 4, 2, 1)]
    return initialise(nn.Sequential(*layers, nn.Sigmoid()), how)


def digit_classifier(channels: int, size: int) -> nn.Module:
    """(B, channels, size, size) images in [0, 1] -> (B, 10) logits: the judge of Tables 1 and 3, started by PyTorch.

    MMVAE's (src/report/helper.py), which DMVAE's release copies; both load weights whose training is not published.
    """
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * side * side, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10),
    )  # fmt: skip


class Augment(nn.Module):
    """While training, each image (B, C, H, W) in [0, 1] turned, scaled, sheared and moved, its contrast and brightness
    changed, and every second one's colours inverted; in evaluation the images as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        n = len(x)

        def uniform(*shape: int, most: float) -> Tensor:
            return most * (2 * torch.rand(n, *shape, device=x.device) - 1)

        maps = torch.eye(2, 3, device=x.device) + torch.cat([uniform(2, 2, most=0.2), uniform(2, 1, most=0.15)], 2)
        grid = nn.functional.affine_grid(maps, list(x.shape), align_corners=False)
        x = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * (1 + uniform(1, 1, 1, most=0.5)) + mean + uniform(1, 1, 1, most=0.2)
        return torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, 1 - x, x).clamp(0, 1)


class Residual(nn.Module):
    """Two 3x3 convolutions and a way round them (He et al. 2016), (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = (
            nn.Identity() if (inputs, stride) == (outputs, 1) else nn.Sequential(around, nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.around(x))


def residual_classifier(channels: int, classes: int = 10) -> nn.Module:
    """(B, channels, H, W) images in [0, 1] -> (B, classes) logits: the strong judge, beside the protocol's. Ours.

    A convolution and a pooling, then four residual blocks of 32, 64, 128 and 128 channels: 0.6 million weights.
    """
    layers = [nn.Conv2d(channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [Residual(32, 32), Residual(32, 64, 2), Residual(64, 128, 2), Residual(128, 128)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(Augment(), *layers, *blocks, *head).to(memory_format=torch.channels_last)


class JointEncoder(nn.Module):
    """JMVAE's and TELBO's joint network, {name: (B, ...)} of all modalities -> (B, 2 * shared_dim) statistics.

    features[name]: (B, ...) -> (B, f), any encoder; their outputs, `features_dim` in all, are concatenated and go
    through ReLU and one hidden layer, as JMVAE's authors join theirs (Suzuki et al. 2016, github.com/masa-su/jmvae,
    on MNIST and its labels, 512 hidden); what comes before is ours, for they have no MNIST-SVHN.
    """

    def __init__(
        self,
        features: Mapping[str, nn.Module],
        features_dim: int,
        shared_dim: int,
        hidden: int = 512,
        how: str = "release",
    ):
        super().__init__()
        self.features = nn.ModuleDict(features)
        layers = [nn.ReLU(), nn.Linear(features_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * shared_dim)]
        self.head = initialise(nn.Sequential(*layers), how)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.head(torch.cat([features(batch[name]) for name, features in self.features.items()], -1))


# --- flowers (Sec. 5.2; the release has none of it) -------------------------------------------------------------------


def feature_encoder(features_dim: int, private_dim: int, shared_dim: int, how: str = "release") -> nn.Module:
    """(B, features_dim) -> statistics, linear: the paper's encoder of images and of captions' features (Sec. 5.2)."""
    return initialise(nn.Linear(features_dim, 2 * (private_dim + shared_dim)), how)


def feature_decoder(
    features_dim: int, private_dim: int, shared_dim: int, hidden: int, how: str = "release"
) -> nn.Module:
    """[private, shared] -> hidden ReLU -> (B, features_dim). The paper is silent on it; the hidden layer is ours."""
    layers = [nn.Linear(private_dim + shared_dim, hidden), nn.ReLU(), nn.Linear(hidden, features_dim)]
    return initialise(nn.Sequential(*layers), how)


def trim(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token embeddings (B, T, D), zero after each caption's last token -> (B, L, D) and its mask (B, L), L the longest.

    The mask is true up to a caption's last token. Raises DMVAEError for another shape and for captions without tokens.
    """
    if tokens.dim() != 3:
        raise DMVAEError(f"captions of shape {tuple(tokens.shape)}; expected token embeddings (B, T, D).")
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = ((tokens != 0).any(-1) * (steps + 1)).amax(1)
    if empty := int((lengths == 0).sum()):
        raise DMVAEError(f"{empty} captions have no token: all their embeddings are zero. Leave them out.")
    longest = int(lengths.max())
    return tokens[:, :longest], steps[:longest] < lengths[:, None]


GROUPS = 3  # of captions by length: on a CPU an update of a row of Table 2 takes two thirds of the time


class TextFeatures(nn.Module):
    """Token embeddings (B, T, D) -> bidirectional LSTM -> maximum over the tokens, (B, 2 * hidden) (Sec. 5.2).

    Zero rows after the last token are padding, which changes nothing; on a CPU captions of like length go together, for
    less of it. The LSTM starts as PyTorch's do.
    """

    def __init__(self, token_dim: int, hidden: int = 512):
        super().__init__()
        self.onwards = nn.LSTM(token_dim, hidden, batch_first=True)
        self.backwards = nn.LSTM(token_dim, hidden, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, mask = trim(tokens)
        if len(tokens) < 2 * GROUPS or tokens.device.type != "cpu":  # a GPU would wait for the launches
            return self.maximum(tokens, mask)
        by_length = mask.sum(1).argsort()
        found = [self.maximum(*trim(tokens[rows])) for rows in by_length.chunk(GROUPS)]
        return torch.cat(found)[by_length.argsort()]

    def maximum(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The same for a batch as `trim` gives it, at once."""
        # Each caption turned round within its own length, the padding staying behind it: no packed sequences, whose
        # LSTM is slower on a CPU. The maximum over time does not mind the order of the states.
        steps = torch.arange(mask.shape[1], device=tokens.device)
        turned = torch.where(mask, mask.sum(1, keepdim=True) - 1 - steps, steps)
        reverse = tokens.gather(1, turned[..., None].expand_as(tokens))
        states = torch.cat([self.onwards(tokens)[0], self.backwards(reverse)[0]], -1)
        return states.masked_fill(~mask[..., None], -torch.inf).amax(1)
