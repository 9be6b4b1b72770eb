"""The paper's encoders, decoders and evaluation classifiers; nothing trainable lives elsewhere.

Every encoder returns (B, 2 * private_dim + 2 * shared_dim) statistics, every decoder takes [private, shared].
The SVHN networks keep their convolutions' weights channels-last, the order that CPUs and tensor cores compute in.
`width` scales the hidden layers: 1 is the paper's network (authors' release), the `quick` profile uses less.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmvae_lib.errors import DMVAEError


def statistics_dim(private_dim: int, shared_dim: int) -> int:
    """Mean and log-variance of the private part, then of the shared part."""
    return 2 * (private_dim + shared_dim)


def initialise(network: nn.Module) -> nn.Module:
    """Kaiming-uniform weights for linear and convolutional layers, zero biases (authors' release)."""
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


class Upsampling(nn.ConvTranspose2d):
    """The transposed convolution (B, i, H, W) -> (B, o, 2 H, 2 W) with a 4 x 4 kernel, made for few channels o.

    A CPU's kernels compute it at a tenth of their rate. There it is an ordinary convolution to the 2 x 2 pixels that
    each pixel becomes, in half the time; its gradients are the transposed convolution's. It takes batches alone there,
    and no second derivatives, no torch.func and no autocast.
    """

    def __init__(self, i: int, o: int, bias: bool = True):
        super().__init__(i, o, 4, 2, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.device.type != "cpu":
            return super().forward(x)
        y = _Upsample.apply(x, self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]


class _Upsample(torch.autograd.Function):
    # Output pixel 2 i + r takes x[j] w[k] with 2 j + k - 1 = 2 i + r, so j = i - 1, i, i + 1 by k = r + 3, r + 1, r - 1.
    # The places of these in the kernel padded by one zero at either end:
    TAPS = torch.tensor([[4, 2, 0], [5, 3, 1]])

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = F.pad(weight, (1, 1, 1, 1))[:, :, _Upsample.TAPS][..., _Upsample.TAPS]  # (i, o, r, 3, s, 3)
        kernel = taps.permute(1, 2, 4, 0, 3, 5).reshape(-1, len(weight), 3, 3)
        return F.pixel_shuffle(F.conv2d(x, kernel, padding=1), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        mask = [*ctx.needs_input_grad, False]  # of x, weight and a bias
        sizes = [2, 2], [1, 1], [1, 1], True, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
        return torch.ops.aten.convolution_backward(gradient, *ctx.saved_tensors, None, *sizes, mask)[:2]


def mnist_encoder(private_dim: int, shared_dim: int, hidden: int = 256) -> nn.Module:
    """(B, 1, 28, 28) -> 784 -> 256 ReLU -> statistics."""
    layers = [nn.Flatten(), nn.Linear(784, hidden), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Linear(hidden, statistics_dim(private_dim, shared_dim))))


def mnist_decoder(private_dim: int, shared_dim: int, hidden: int = 256) -> nn.Module:
    """[private, shared] -> 256 ReLU -> 784 logits, (B, 1, 28, 28)."""
    layers = [nn.Linear(private_dim + shared_dim, hidden), nn.ReLU(), nn.Linear(hidden, 784)]
    return initialise(nn.Sequential(*layers, nn.Unflatten(1, (1, 28, 28))))


def svhn_encoder(private_dim: int, shared_dim: int, width: float = 1.0) -> nn.Module:
    """(B, 3, 32, 32) -> four bias-free convolutions 32-64-128-256 (kernel 4, stride 2) -> 512 -> statistics."""
    channels = [3, *(round(width * c) for c in (32, 64, 128, 256))]
    layers: list[nn.Module] = []
    for i, o in zip(channels, channels[1:]):
        layers += [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.ReLU()]
    hidden = round(width * 512)
    layers += [nn.Flatten(), nn.Linear(4 * channels[-1], hidden), nn.ReLU(), nn.Dropout(0.1)]
    layers += [nn.Linear(hidden, statistics_dim(private_dim, shared_dim))]
    return initialise(nn.Sequential(*layers)).to(memory_format=torch.channels_last)


def svhn_decoder(private_dim: int, shared_dim: int, width: float = 1.0) -> nn.Module:
    """[private, shared] -> 1024 ReLU -> (256, 2, 2) -> four bias-free transposed convolutions 128-64-32-3 logits."""
    channels = [*(round(width * c) for c in (256, 128, 64, 32)), 3]
    layers: list[nn.Module] = [nn.Linear(private_dim + shared_dim, 4 * channels[0]), nn.ReLU()]
    layers += [nn.Unflatten(1, (channels[0], 2, 2))]
    for i, o in zip(channels[:-1], channels[1:-1]):
        layers += [nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.ReLU()]
    layers += [Upsampling(channels[-2], 3, bias=False)]
    return initialise(nn.Sequential(*layers)).to(memory_format=torch.channels_last)


def mmvae_svhn_encoder(latent_dim: int, width: float = 1.0) -> nn.Module:
    """MMVAE's: (B, 3, 32, 32) -> convolutions 32-64-128 (kernel 4, stride 2) -> a 4x4 convolution -> (B, 2 latent)."""
    channels = [3, *(round(width * c) for c in (32, 64, 128))]
    layers: list[nn.Module] = []
    for i, o in zip(channels, channels[1:]):
        layers += [nn.Conv2d(i, o, 4, 2, 1), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Conv2d(channels[-1], 2 * latent_dim, 4), nn.Flatten()))


def mmvae_svhn_decoder(latent_dim: int, width: float = 1.0) -> nn.Module:
    """MMVAE's mirror image: z -> (128, 4, 4) -> transposed convolutions 64-32-3 -> means in [0, 1]."""
    channels = [*(round(width * c) for c in (128, 64, 32)), 3]
    layers: list[nn.Module] = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, channels[0], 4)]
    for i, o in zip(channels[:-1], channels[1:-1]):
        layers += [nn.ReLU(), nn.ConvTranspose2d(i, o, 4, 2, 1)]
    layers += [nn.ReLU(), Upsampling(channels[-2], 3)]
    return initialise(nn.Sequential(*layers, nn.Sigmoid()))


def digit_classifier(channels: int, size: int) -> nn.Module:
    """MMVAE's evaluation classifier for (B, channels, size, size) images in [0, 1] -> (B, 10) logits."""
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * side * side, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10),
    )  # fmt: skip


def feature_encoder(features_dim: int, private_dim: int = 3, shared_dim: int = 64) -> nn.Module:
    """(B, features_dim) -> statistics, linear: the paper's encoder of images and of captions' features (Sec. 5.2)."""
    return initialise(nn.Linear(features_dim, statistics_dim(private_dim, shared_dim)))


def feature_decoder(features_dim: int, private_dim: int = 3, shared_dim: int = 64, hidden: int = 512) -> nn.Module:
    """[private, shared] -> hidden ReLU -> (B, features_dim). The paper is silent on it; the hidden layer is ours."""
    layers = [nn.Linear(private_dim + shared_dim, hidden), nn.ReLU(), nn.Linear(hidden, features_dim)]
    return initialise(nn.Sequential(*layers))


def trim(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token embeddings (B, T, D), zero after each caption's last token -> (B, L, D) and its mask (B, L), L the longest.

    The mask is true up to a caption's last token. Raises DMVAEError for another shape and for captions without tokens.
    """
    if tokens.dim() != 3:
        raise DMVAEError(f"captions of shape {tuple(tokens.shape)}; expected token embeddings (B, T, D).")
    present = (tokens != 0).any(-1)
    lengths = (present * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1)
    shortest, longest = (int(length) for length in lengths.aminmax())
    if shortest == 0:
        raise DMVAEError(f"{int((lengths == 0).sum())} captions have no token: all their embeddings are zero.")
    steps = torch.arange(longest, device=tokens.device)
    return tokens[:, :longest], steps < lengths[:, None]


class TextFeatures(nn.Module):
    """Token embeddings (B, T, D) -> bidirectional LSTM -> maximum over the tokens, (B, 2 * hidden) (Sec. 5.2).

    Zero rows after the last token are padding, which changes nothing.
    """

    def __init__(self, token_dim: int, hidden: int = 512):
        super().__init__()
        self.onwards = nn.LSTM(token_dim, hidden, batch_first=True)
        self.backwards = nn.LSTM(token_dim, hidden, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, mask = trim(tokens)
        # Each caption turned round within its own length, the padding staying behind it: no packed sequences, whose
        # LSTM is slower on a CPU. The maximum over time does not mind the order of the states.
        steps = torch.arange(mask.shape[1], device=tokens.device)
        turned = torch.where(mask, mask.sum(1, keepdim=True) - 1 - steps, steps)
        reverse = tokens.gather(1, turned[..., None].expand_as(tokens))
        states = torch.cat([self.onwards(tokens)[0], self.backwards(reverse)[0]], -1)
        return states.masked_fill(~mask[..., None], -torch.inf).amax(1)


class JointEncoder(nn.Module):
    """JMVAE's and TELBO's joint network, {name: (B, ...)} of all modalities -> (B, 2 * shared_dim) statistics.

    features[name]: (B, ...) -> (B, f), any encoder; their outputs, `features_dim` in all, are concatenated and go
    through ReLU and one hidden layer.
    """

    def __init__(self, features: Mapping[str, nn.Module], features_dim: int, shared_dim: int, hidden: int = 512):
        super().__init__()
        self.features = nn.ModuleDict(features)
        layers = [nn.ReLU(), nn.Linear(features_dim, hidden), nn.ReLU()]
        self.head = initialise(nn.Sequential(*layers, nn.Linear(hidden, statistics_dim(0, shared_dim))))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.head(torch.cat([features(batch[name]) for name, features in self.features.items()], -1))
