"""A data set of one's own, as a stranger would write it: blurred bars, left or top, in three classes; milliseconds a run."""

import torch
from torch import nn

from dmvae_lib import PairedData
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import TABLE1
from dmvae_lib.paper.runs import Setting, replace


def load(source, root, evaluation, cache=None, device="cpu", permutations=30) -> Splits:
    def pairs(n: int, seed: int) -> PairedData:
        generator = torch.Generator().manual_seed(seed)
        labels = {name: torch.randint(3, (n,), generator=generator) for name in ("left", "top")}
        images = {name: 0.3 * torch.rand(n, 1, 4, 4, generator=generator) for name in labels}
        for i in range(n):
            images["left"][i, 0, :, labels["left"][i]] += 0.7
            images["top"][i, 0, labels["top"][i]] += 0.7
        return PairedData.pair(images, labels, permutations)

    train = pairs(150, 0)
    return Splits(train, pairs(30, 1 if evaluation == "test" else 2), {"left": "bars", "top": "beams"}, source)


def networks(family, modality, private_dim, shared_dim, width, initialise):
    code = private_dim + shared_dim
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 2 * code))
    decoder = nn.Sequential(nn.Linear(code, 16), nn.Unflatten(1, (1, 4, 4)))
    return encoder, nn.Sequential(decoder, nn.Sigmoid()) if family == "mmvae" else decoder


def classifier(modality):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3))


TOY = DataSet("toy", ("left", "top"), load, networks, {"embedded": {"left": 2.0, "top": 1.0}}, classifier)
OPTIONS = {"shared_dim": 3, "private_dims": {"left": 1, "top": 2}, "initialise": "pytorch"}
ROW = replace(TABLE1["DMVAE"], name="toy-dmvae", title="DMVAE of toys", data=TOY, options=OPTIONS)
SHARED = {"shared_dim": 3, "initialise": "pytorch"}
MVAE_ROW = replace(TABLE1["MVAE"], name="toy-mvae", title="MVAE of toys", data=TOY, options=SHARED)


def place_in(folder, **changes) -> Setting:
    """A setting that writes its ledger below `folder`; changes: of the profile."""
    short = {"name": "toys", "steps": 40, "batch_size": 10, "classifier_steps": 20, "permutations": 4}
    profile = replace(get_profile("smoke"), **short | {"writes_results": True} | changes)
    return Setting(profile, device="cpu", runs=folder / "runs", results=folder / "results" / profile.name)
