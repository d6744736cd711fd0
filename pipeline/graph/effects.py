"""What each operation does to a layout."""

from __future__ import annotations

from enum import Enum


class Effect(Enum):
    """How an operation relates the layouts of its inputs to that of its output.

    All but the last treat every image by itself (of BATCHNORM the sums over images can be exchanged), and so keep B.
    """

    KERNEL = "kernel"
    """Makes output channels from all input channels with a weight: convolution and dense layer."""
    GROUPED = "grouped"
    """A convolution in groups: keeps K where the borders of the groups allow."""
    CHANNELWISE = "channelwise"
    """Channel ``k`` of the output needs only channel ``k`` of each input (and of the parameters): keeps K."""
    BATCHNORM = "batchnorm"
    """Channelwise, with statistics over all images."""
    FLATTEN = "flatten"
    """Every channel becomes ``H * W`` adjacent channels: keeps K with scaled shares."""
    IMAGEWISE = "imagewise"
    """Needs all channels of an image: every rank that has all channels can do it."""
    WHOLE = "whole"
    """Anything else: it runs on the master."""
