"""Run by test_hub.py against a server of its own: pushes models, loads them back, prints what came of it as JSON."""

import json

from torch import nn

from dmvae_lib import DMVAE, DMVAEError, Modality


def modalities():
    return {name: Modality(nn.Linear(size, 6), nn.Linear(3, size), 1) for name, size in (("audio", 4), ("video", 3))}


def total(model):
    return sum(parameter.double().sum().item() for parameter in model.parameters())


def refusal(source, **options):
    try:
        DMVAE.from_pretrained(source, modalities(), **options)
    except DMVAEError as error:
        return str(error)
    return "no error"


answer = {}
models = {name: DMVAE(modalities(), 2) for name in ("first", "second")}
commits = {name: model.push_to_hub("tester/model", commit_message=name) for name, model in models.items()}
answer |= {name: total(model) for name, model in models.items()}
answer["pinned"] = total(DMVAE.from_pretrained("tester/model", modalities(), revision=commits["first"], token="t"))
answer["newest"] = total(DMVAE.from_pretrained("tester/model", modalities()))
answer["no revision"] = refusal("tester/model", revision="0" * 40)
answer["no repository"] = refusal("tester/nothing")
print(json.dumps(answer))
