"""Components: the parameters that people write by hand, ready made. One family a file."""

from learnables.nn.activations import DyT, Snake
from learnables.nn.attention import AttentionSinks, DifferentialLambda, HeadMixing, QueryValueBias
from learnables.nn.block_sparse_linear import BlockSparseLinear
from learnables.nn.color import ColorLUT, ColorMatrix
from learnables.nn.component import Component
from learnables.nn.deltas import BlockSparseDelta, LowRankDelta
from learnables.nn.dynamic_conv import DynamicConv2d
from learnables.nn.dynamic_linear import DynamicLinear
from learnables.nn.experts import ExpertBank, Projection
from learnables.nn.logits import LogitBias, LogitScale, Temperature
from learnables.nn.mixing import LayerMix, ResidualMix
from learnables.nn.modulation import AdaLNTable
from learnables.nn.positions import (
    FactorizedPositions,
    FramePositions,
    LevelEmbedding,
    Positions1d,
    Positions2d,
)
from learnables.nn.prompts import DeepPrompts, MemoryKeyValues, MemoryTokens, Prompts
from learnables.nn.queries import Queries, SlotEmbeddings, Slots
from learnables.nn.recurrence import StateSpaceVectors
from learnables.nn.relative import (
    AttentionBias,
    ContentPositionBias,
    DecomposedRelativeBias,
    RelativeBias,
)
from learnables.nn.rotary import RotaryFrequencies
from learnables.nn.scales import Gate, HeadScale, LayerScale, LayerScale2d, QKScale, ReZero
from learnables.nn.tokens import (
    ClassToken,
    DistillationToken,
    MarkerToken,
    MaskToken,
    NullCondition,
    RegisterTokens,
)

__all__ = [
    "AdaLNTable",
    "AttentionBias",
    "AttentionSinks",
    "BlockSparseDelta",
    "BlockSparseLinear",
    "ClassToken",
    "ColorLUT",
    "ColorMatrix",
    "Component",
    "ContentPositionBias",
    "DecomposedRelativeBias",
    "DeepPrompts",
    "DifferentialLambda",
    "DistillationToken",
    "DyT",
    "DynamicConv2d",
    "DynamicLinear",
    "ExpertBank",
    "FactorizedPositions",
    "FramePositions",
    "Gate",
    "HeadMixing",
    "HeadScale",
    "LayerMix",
    "LayerScale",
    "LayerScale2d",
    "LevelEmbedding",
    "LogitBias",
    "LogitScale",
    "LowRankDelta",
    "MarkerToken",
    "MaskToken",
    "MemoryKeyValues",
    "MemoryTokens",
    "NullCondition",
    "Positions1d",
    "Positions2d",
    "Projection",
    "Prompts",
    "QKScale",
    "Queries",
    "QueryValueBias",
    "ReZero",
    "RegisterTokens",
    "RelativeBias",
    "ResidualMix",
    "RotaryFrequencies",
    "SlotEmbeddings",
    "Slots",
    "Snake",
    "StateSpaceVectors",
    "Temperature",
]
