"""Paired multimodal data: the pairing protocol and the loaders."""

from dmvae_lib.data.digits import Digits, load_digits
from dmvae_lib.data.flowers import FlowerData, load_flowers
from dmvae_lib.data.pairing import PairedData, pair_by_class, pair_many

__all__ = ["Digits", "FlowerData", "PairedData", "load_digits", "load_flowers", "pair_by_class", "pair_many"]
