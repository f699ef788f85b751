"""What kind of parameter an entry is, and whether that kind is decayed toward zero by default.

No optimizer can know what a hand-written parameter is; its owner, its shape and the names that
people use tell. Decay of such parameters is a convention, not a law: DeiT's authors decay the
distillation token on purpose. Each kind names the reference that its default follows; a
declaration overrules it.
"""

import re
from dataclasses import dataclass

from torch import nn

from learnables._torch import MATRIX_OWNERS, NORMS
from learnables.entries import Entry


@dataclass(frozen=True)
class Kind:
    """A kind of parameter and the default that follows from it.

    Attributes:
        name: What a person calls it.
        decays: Whether weight decay toward zero is the default.
        follows: The code or paper that treats it so.
    """

    name: str
    decays: bool
    follows: str


MATRIX = Kind("matrix", True, "every reference")
EMBEDDING = Kind("embedding", True, "BERT, nanoGPT, timm: a look-up table is a matrix")
LOW_RANK = Kind("low-rank factor", True, "LoRA: decays the difference to the base weight")
NORM = Kind("norm", False, "timm, nanoGPT, big_vision")
BIAS = Kind("bias", False, "timm, nanoGPT, big_vision")
VECTOR = Kind("vector", False, "timm, nanoGPT: fewer than two dimensions")
BROADCAST = Kind("broadcast", False, "a vector with dimensions of size 1, hence as a vector")
COLOUR = Kind("colour transform", False, "no library has it; better toward the identity")
RELATIVE = Kind("relative position", False, "Swin, timm mvitv2")
POSITION = Kind("position", False, "timm, big_vision")
ACTIVATION = Kind("activation", False, "PReLU (He et al. 2015): decay pulls it toward ReLU")

# Names that say "I am a matrix", whatever other word is in them: gate_proj, query_weight, w1.
_SAYS_MATRIX = re.compile(r"weight|kernel|proj|expert|filter")
_HINTS_MATRIX = re.compile(r"(^|_)(w\d*|fc\d*|up|down)(_|$)")
_SAYS_NOTHING = re.compile(r"^(weights?|embeddings?|table|matrix|values?|data|params?|tensor)$")

# (what people write, the kind); the first match counts. Searched in the lower-case local name, or
# in the name of the module for an nn.Embedding called e.g. pos_embed.
_NAMES: tuple[tuple[str, Kind], ...] = (
    (r"lora|vera_|hada|lokr", LOW_RANK),
    (r"colou?r|lut(_|\d|$)|ccm", COLOUR),
    (r"rel(ative)?_?(pos|bias|att)|rel_[hw]|(^|_)rel(_|$)|attention_bias", RELATIVE),
    (r"pos(ition)?(al)?s?(_|\d|$|emb|enc)|(^|_)a?pe$|wpe", POSITION),
    (r"freq|omega|(^|_)theta|rope", Kind("frequency", False, "timm eva: rope in no_weight_decay")),
    (
        r"(cls|class|dist|distill|reg|register|mask|null|pad|sep|bos|eos|special|storage|marker|gist"
        r"|summary|newline).*(tok|emb|vec)|tok(en)?s?$|^cls$|registers?$|newline|masked_spec|uncond",
        Kind("token", False, "timm: cls_token, reg_token in no_weight_decay"),
    ),
    (r"prompt|prefix|soft_|(^|_)ctx", Kind("prompt", False, "as tokens; VPT decays")),
    (
        r"mem(ory|_|$)|persist|null_k|bias_[kv]$",
        Kind("memory", False, "as tokens; Memory Transformer"),
    ),
    (
        r"quer(y|ies)|latent|slot|probe|inducing|(^|_)seeds?(_|$)",
        Kind("query", False, "as tokens; DETR, Perceiver"),
    ),
    (
        r"(type|level|view|seg(ment)?|modality|task|lang|time|step|frame|layer)s?_?emb",
        Kind("marker", False, "as positions; Deformable DETR level_embed"),
    ),
    (r"sinks?(_|$)", Kind("attention sink", False, "as biases")),
    (r"modulation|scale_shift|ada_?ln|shift_table", Kind("modulation table", False, "PixArt")),
    (
        r"a_?log|^d$|dt_|(^|_)time_(dec|first|mix|maa|faa|std)|log_dt|_decay$",
        Kind("state space", False, "Mamba: _no_weight_decay"),
    ),
    (r"mix|lambda|hyper_|talking|layer_w", Kind("mixing", False, "modded-nanogpt: wd_mul 0")),
    (
        r"codebook|codevec|prototype|cent(er|re|roid)s?|anchor|cluster",
        Kind("codebook", False, "wav2vec 2.0: straight-through, not decayed"),
    ),
    (
        r"gamma|scal(e|ing)|gain|(^|_)alpha|beta$|temperature|(^|_)tau|skip|rezero|(^|_)ls\d*$|logit",
        Kind("scale", False, "CaiT LayerScale in timm; CLIP logit_scale in open_clip"),
    ),
)
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _NAMES)
KINDS = (
    MATRIX,
    EMBEDDING,
    NORM,
    BIAS,
    *(kind for _, kind in _NAMES),
    ACTIVATION,
    BROADCAST,
    VECTOR,
)

_HEAD = re.compile(
    r"(^|\.)(lm_|cls_|out_)?(head|heads|classifier|logits|output|fc_out|score)(\.|$)"
)


def kind_of(entry: Entry) -> Kind:
    """The kind of ``entry``, by its owner, then by its name, then by its shape.

    A parameter with several names is what its first name says; what one owner calls a position
    table does not become a matrix by being shared.
    """
    owner, shape = entry.owner, entry.shape
    local, context = _effective_names(entry)
    home = type(owner).__module__  # a container of torch's holds what somebody else wrote
    stock = home.startswith("torch.nn.modules.") and not home.endswith((".container", ".module"))
    if isinstance(owner, NORMS) or ("norm" in type(owner).__name__.lower() and len(shape) <= 1):
        return NORM
    if isinstance(owner, nn.PReLU):
        return ACTIVATION
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and local == "weight":
        return _by_name(context) or EMBEDDING
    if isinstance(owner, MATRIX_OWNERS) and len(shape) >= 2 and "weight" in local:
        return MATRIX
    named = None if stock and local in ("weight", "bias") else _by_name(local)
    if named is not None and (named.decays or len(shape) >= 2):
        return named
    if _SAYS_NOTHING.match(local) and (named := _by_name(context)) in (POSITION, RELATIVE, COLOUR):
        return named
    if re.search(r"(^|_)bias(_|\d|$)", local) or local in ("b", "beta"):
        return BIAS
    if len(shape) <= 1:
        return named or VECTOR
    if 1 in shape and not _SAYS_MATRIX.search(local) and not stock:
        return BROADCAST
    if sum(size > 1 for size in shape) <= 1 and not stock:
        return BROADCAST
    return MATRIX


def is_hidden_matrix(entry: Entry) -> bool:
    """Whether Muon is meant for it: 2-D, a matrix, neither embedding nor output head.

    Source:
        Jordan, *Muon: an optimizer for hidden layers*, https://kellerjordan.github.io/posts/muon.
    """
    return (
        entry.param.ndim == 2
        and kind_of(entry) in (MATRIX, LOW_RANK)
        and not any(isinstance(p.owner, (nn.Embedding, nn.EmbeddingBag)) for p in entry.places)
        and not any(_HEAD.search(name) for name in entry.plain_names)
    )


def _effective_names(entry: Entry) -> tuple[str, str]:
    """The local name and the module's name, looking through torch's parametrizations."""
    parts = entry.plain_names[0].lower().split(".")
    if "parametrizations" in parts[:-1]:
        at = parts.index("parametrizations")
        parts = [*parts[:at], *parts[at + 1 : at + 2]]
    if parts[-1].isdigit() and len(parts) > 1:  # an item of a ParameterList is named by its list
        parts = parts[:-1]
    return parts[-1], parts[-2] if len(parts) > 1 else ""


def _by_name(name: str) -> Kind | None:
    believed = [LOW_RANK, COLOUR]  # whatever else the name says
    if not _SAYS_MATRIX.search(name):
        believed += [RELATIVE, POSITION]
        if not _HINTS_MATRIX.search(name):
            believed += KINDS
    return next((k for pattern, k in _COMPILED if k in believed and pattern.search(name)), None)
