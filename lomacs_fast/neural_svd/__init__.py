"""The SVD of given matrices by optimisation: `neural_svd`, `NeuralSVD` to train yourself, sources, advice."""

from .advice import Advice, advise
from .factors import FactorMLP, FactorTable, NeuralSVD
from .solver import NeuralSVDResult, neural_svd
from .sources import MatrixSource, open_matrix

__all__ = [
    "Advice",
    "FactorMLP",
    "FactorTable",
    "MatrixSource",
    "NeuralSVD",
    "NeuralSVDResult",
    "advise",
    "neural_svd",
    "open_matrix",
]
