"""The numbers the paper prints, in percent, each with the table it stands in."""

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
