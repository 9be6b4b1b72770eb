"""The numbers the paper prints, in percent, each with the table it stands in, and what its text claims of them."""

from typing import NamedTuple

MEASURES = {  # what the paper calls them; a measure that it lacks goes by its own name
    "mnist->svhn": "Cross(M → S)",
    "svhn->mnist": "Cross(S → M)",
    "joint": "Joint",
    "rank1": "Img2Txt (Rank-1)",
    "ap50": "Txt2Img (AP@50)",
}

TABLE1 = {  # Classification accuracy for cross-synthesized MNIST and SVHN and joint matching accuracy
    "MVAE": {"mnist->svhn": 9.5, "svhn->mnist": 9.3, "joint": 12.7},
    "MMVAE": {"mnist->svhn": 86.4, "svhn->mnist": 69.1, "joint": 42.1},
    "DMVAE": {"mnist->svhn": 88.1, "svhn->mnist": 83.7, "joint": 44.7},
}

TABLE2 = {  # Recognition and retrieval on Oxford-102 Flowers: Rank-1 (image to text), AP@50 (text to image)
    "Word2Vec": {"rank1": 54.2, "ap50": 52.1},
    "GMM+HGLMM": {"rank1": 54.8, "ap50": 52.8},
    "Word CNN": {"rank1": 60.7, "ap50": 56.3},
    "Word CNN-RNN": {"rank1": 65.6, "ap50": 59.6},
    "Triplet": {"rank1": 64.3, "ap50": 64.9},
    "IATV": {"rank1": 68.9, "ap50": 69.7},
    "CMPM+CMPC": {"rank1": 68.4, "ap50": 70.1},
    "TIMAM": {"rank1": 70.6, "ap50": 73.7},
    "DMVAE": {"rank1": 73.3, "ap50": 73.6},
}

TABLE3 = {  # Ablation on MNIST and SVHN; rows in the paper's order
    "full": {"mnist->svhn": 88.13, "svhn->mnist": 83.73},
    "no PoE": {"mnist->svhn": 87.33, "svhn->mnist": 77.33},
    "no crVAE M2S": {"mnist->svhn": 87.85, "svhn->mnist": 82.83},
    "no crVAE S2M": {"mnist->svhn": 82.7, "svhn->mnist": 17.03},
    "no crVAE": {"mnist->svhn": 83.19, "svhn->mnist": 12.75},
    "no private spaces": {"mnist->svhn": 12.38, "svhn->mnist": 82.72},
}


class Claim(NamedTuple):
    """What the text says about a table: one cell is greater than `factor` times another. Cells are (row, measure)."""

    text: str
    greater: tuple[str, str]
    than: tuple[str, str]
    factor: float = 1.0


M2S, S2M, JOINT = "mnist->svhn", "svhn->mnist", "joint"
CLAIMS = {
    "table1": [  # Sec. 5.1: "We outperform baselines in both direction of cross-synthesis", and in joint matching
        Claim(f"DMVAE above {baseline}, {label}", ("DMVAE", measure), (baseline, measure))
        for baseline in ("MVAE", "MMVAE")
        for measure, label in ((M2S, "M → S"), (S2M, "S → M"), (JOINT, "joint"))
    ],
    "table3": [  # Sec. 5.3; a collapse is a fall below half of the full model's
        Claim("without PoE, M → S drops", ("full", M2S), ("no PoE", M2S)),
        Claim("without PoE, S → M drops", ("full", S2M), ("no PoE", S2M)),
        Claim("without crVAE S2M, S → M collapses", ("full", S2M), ("no crVAE S2M", S2M), 2),
        Claim("without any crVAE, S → M collapses", ("full", S2M), ("no crVAE", S2M), 2),
        Claim("without private spaces, M → S collapses", ("full", M2S), ("no private spaces", M2S), 2),
        Claim("without private spaces, S → M stays", ("no private spaces", S2M), ("full", S2M), 0.9),
    ],
    "table2": [  # Sec. 5.2: "DMVAE outperforms competition on the image-to-text cross-recognition", "identical" in retrieval
        *(Claim(f"DMVAE above {row}, Img2Txt", ("DMVAE", "rank1"), (row, "rank1")) for row in TABLE2 if row != "DMVAE"),
        Claim("DMVAE as good as TIMAM, Txt2Img", ("DMVAE", "ap50"), ("TIMAM", "ap50"), 0.99),
    ],
}

# PolyMNIST with its own five backgrounds, the full data and 300 to 500 epochs: coherence given 1 to 4 of the others.
POLYMNIST = {
    "MoPoE": {"1 given": 66.0, "2 given": 77.0, "3 given": 81.0, "4 given": 83.0},  # Sutter et al. 2021
    "MVTCAE": {"1 given": 69.0, "2 given": 77.0, "3 given": 83.0, "4 given": 86.0},  # Hwang et al. 2021
    "MMVAE+": {"1 given": 86.9},  # Palumbo et al. 2023
}
# CdSprites+'s leaderboard, "strict", its DMVAE by self and joint bounds alone (gabinsane/multimodal-vae-comparison).
CDSPRITES = {
    1: {"image->caption": 4.0, "caption->image": 33.0, "joint": 4.0},
    2: {"image->caption": 4.0, "caption->image": 15.0, "joint": 0.0},
}
