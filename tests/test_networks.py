"""The networks: sizes and initial weights as published, layer by layer; text features against PyTorch's packed LSTM."""

import math

import pytest
import torch
from torch import nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.paper.data.digits import MNIST_SVHN
from dmvae_lib.paper.networks import (
    INITIALISATIONS,
    JointEncoder,
    TextFeatures,
    digit_classifier,
    initialise,
    mmvae_svhn_decoder,
    mmvae_svhn_encoder,
    mnist_decoder,
    mnist_encoder,
    svhn_decoder,
    svhn_encoder,
    trim,
)


def conv(i, o, bias):
    return (nn.Conv2d, i, o, (4, 4), (2, 2), (1, 1), bias)


def transposed(i, o, bias):
    return (nn.ConvTranspose2d, *conv(i, o, bias)[1:])


def described(network):
    """What each layer of a network is, shapes apart from the weights' left out."""
    found = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            found.append((nn.Linear, layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
            found.append((type(layer), *sizes, layer.bias is not None))
        elif isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            found.append((type(layer), layer.p))
        elif not isinstance(layer, (nn.Flatten, nn.Unflatten)):
            found.append(type(layer))
    return found


# Read off the public releases: github.com/seqam-lab/DMVAE, mnist_svhn/model.py and classifier.py, with the command
# line's sizes (private 1 and 4, shared 10); github.com/iffsid/mmvae, src/models/vae_svhn.py.
RELU = nn.ReLU
PUBLISHED = {
    "DMVAE, MNIST encoder": (mnist_encoder(1, 10), [(nn.Linear, 784, 256, True), RELU, (nn.Linear, 256, 22, True)]),
    "DMVAE, MNIST decoder": (mnist_decoder(1, 10), [(nn.Linear, 11, 256, True), RELU, (nn.Linear, 256, 784, True)]),
    "DMVAE, SVHN encoder": (
        svhn_encoder(4, 10),
        [conv(3, 32, False), RELU, conv(32, 64, False), RELU, conv(64, 128, False), RELU, conv(128, 256, False), RELU]
        + [(nn.Linear, 1024, 512, True), RELU, (nn.Dropout, 0.1), (nn.Linear, 512, 28, True)],
    ),
    "DMVAE, SVHN decoder": (
        svhn_decoder(4, 10),
        [(nn.Linear, 14, 1024, True), RELU, transposed(256, 128, False), RELU, transposed(128, 64, False), RELU]
        + [transposed(64, 32, False), RELU, transposed(32, 3, False)],
    ),
    "MMVAE, SVHN encoder": (  # two last convolutions to 20 each
        mmvae_svhn_encoder(20),
        [conv(3, 32, True), RELU, conv(32, 64, True), RELU, conv(64, 128, True), RELU]
        + [(nn.Conv2d, 128, 40, (4, 4), (1, 1), (0, 0), True)],
    ),
    "MMVAE, SVHN decoder": (
        mmvae_svhn_decoder(20),
        [(nn.ConvTranspose2d, 20, 128, (4, 4), (1, 1), (0, 0), True), RELU, transposed(128, 64, True), RELU]
        + [transposed(64, 32, True), RELU, transposed(32, 3, True), nn.Sigmoid],
    ),
    **{
        f"judge of {channels} channels": (
            digit_classifier(channels, size),
            [(nn.Conv2d, channels, 10, (5, 5), (1, 1), (0, 0), True), nn.MaxPool2d, RELU]
            + [(nn.Conv2d, 10, 20, (5, 5), (1, 1), (0, 0), True), (nn.Dropout2d, 0.5), nn.MaxPool2d, RELU]
            + [(nn.Linear, features, 50, True), RELU, (nn.Dropout, 0.5), (nn.Linear, 50, 10, True)],
        )
        for channels, size, features in ((1, 28, 320), (3, 32, 500))
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_the_releases_in_their_order(name):
    network, layers = PUBLISHED[name]
    assert described(network) == layers


@pytest.mark.parametrize("how", INITIALISATIONS)
@pytest.mark.parametrize("family", ["dmvae", "mmvae"])
@pytest.mark.parametrize("name", ["mnist", "svhn", "joint"])
def test_initial_weights_are_uniform_within_the_bound_of_their_layer(how, family, name):
    """Kaiming: +-sqrt(6 / fan_in) and zero biases; PyTorch: +-sqrt(1 / fan_in) for both."""
    torch.manual_seed(0)
    if name == "joint":
        made = [MNIST_SVHN.joint_encoder(10, 1.0, how)]
    else:
        made = MNIST_SVHN.networks(family, name, 1, 10, 1.0, how)
    checked = 0
    for layer in (layer for network in made for layer in network.modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        # Torch takes the second axis for a fan-in: of a transposed convolution's weights those are the outputs.
        fan_in = layer.weight[0].numel()
        outputs = layer.out_channels if isinstance(layer, nn.ConvTranspose2d) else 0
        assert not outputs or fan_in == outputs * 16
        kaiming = how == "kaiming" or (how == "release" and not isinstance(layer, nn.ConvTranspose2d))
        bound = math.sqrt((6 if kaiming else 1) / fan_in)
        for values, limit in ((layer.weight, bound), (layer.bias, 0 if kaiming else bound)):
            if values is not None:
                assert values.abs().max() <= limit
                # The relative error of a standard deviation from n uniform values is sqrt(0.2 / n).
                error = 5 * math.sqrt(0.2 / values.numel())
                assert values.square().mean().sqrt().item() == pytest.approx(limit / math.sqrt(3), rel=error)
        checked += 1
    assert checked == {("mnist", "dmvae"): 4, ("mnist", "mmvae"): 4, ("svhn", "dmvae"): 11, ("svhn", "mmvae"): 8}.get(
        (name, family), 10
    )


def test_dmvae_starts_as_in_the_release_and_mmvae_as_in_its_own():
    torch.manual_seed(0)
    decoder, other = svhn_decoder(4, 10), mmvae_svhn_decoder(20)
    assert decoder[0].weight.abs().max() > 2.3 / math.sqrt(14) and not decoder[0].bias.any()
    assert decoder[3].weight.abs().max() <= 1 / math.sqrt(128 * 16)
    assert other[1].weight.abs().max() <= 1 / math.sqrt(128 * 16) and other[1].bias.any()


def test_unknown_initialisation_is_an_error():
    with pytest.raises(DMVAEError, match="'he'; expected one of release, kaiming, pytorch"):
        initialise(nn.Linear(1, 1), "he")


def test_joint_encoder_reads_every_modality():
    torch.manual_seed(0)
    encoder = JointEncoder({"a": nn.Linear(3, 4), "b": nn.Linear(2, 5)}, 9, 6, hidden=8)
    batch = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, 2, requires_grad=True)}
    statistics = encoder(batch)
    assert statistics.shape == (2, 12)
    for gradient in torch.autograd.grad(statistics.square().sum(), batch.values()):
        assert gradient.abs().sum(1).all()
    turned = {"b": batch["b"], "a": batch["a"]}
    assert torch.equal(encoder(turned), statistics)


# --- flowers --------------------------------------------------------------------------------------------------------


def captions(n, generator, dim=8, steps=9):
    """(n, steps, dim) token embeddings of various lengths, zero after the last token, and the lengths."""
    lengths = torch.randint(1, steps + 1, (n,), generator=generator)
    tokens = torch.randn(n, steps, dim, generator=generator)
    return tokens * (torch.arange(steps) < lengths[:, None])[..., None], lengths


def test_text_features_are_a_bidirectional_lstm_on_packed_captions_and_the_maximum_over_time():
    tokens, lengths = captions(7, torch.Generator().manual_seed(0))
    features = TextFeatures(8, 6)
    reference = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
    weights = dict(features.onwards.named_parameters())
    weights |= {f"{name}_reverse": value for name, value in features.backwards.named_parameters()}
    reference.load_state_dict(weights)
    packed = nn.utils.rnn.pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
    states, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True, padding_value=-torch.inf)
    torch.testing.assert_close(features(tokens), states.amax(1))


def test_trimming_keeps_everything_up_to_the_last_token():
    tokens = torch.zeros(2, 5, 2)
    tokens[0, 0], tokens[0, 2], tokens[1, 0] = 1.0, torch.tensor([0.0, -1.0]), 3.0  # a zero row within the first
    short, mask = trim(tokens)
    assert short.shape == (2, 3, 2) and mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 3), r"\(2, 3\); expected token embeddings"), ((2, 3, 8), "2 captions have no token")]
)
def test_captions_without_tokens_are_an_error(shape, message):
    with pytest.raises(DMVAEError, match=message):
        TextFeatures(8)(torch.zeros(shape))
