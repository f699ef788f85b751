"""Initialisers as small objects: ``ln.init.trunc_normal(0.02)``. One family a file."""

from learnables.init.base import Initializer
from learnables.init.fans import fans
from learnables.init.fixed import arange, constant, identity, log, ones, softplus_inverse, zeros
from learnables.init.orthogonal import delta_orthogonal, orthogonal
from learnables.init.random import log_uniform, normal, trunc_normal, uniform
from learnables.init.redraw import reset_
from learnables.init.reference import like
from learnables.init.report import InitReport, report
from learnables.init.scaled import (
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
)
from learnables.init.sincos import sincos1d, sincos2d

__all__ = [
    "InitReport",
    "Initializer",
    "arange",
    "constant",
    "delta_orthogonal",
    "fans",
    "identity",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "like",
    "log",
    "log_uniform",
    "normal",
    "ones",
    "orthogonal",
    "report",
    "reset_",
    "sincos1d",
    "sincos2d",
    "softplus_inverse",
    "trunc_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]
