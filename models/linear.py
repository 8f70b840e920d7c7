"""A linear layer that is fast for the few rows of a decoding step too."""

import torch
from torch import Tensor, nn

FEW_ROWS = range(9, 49)
"""Where MKL multiplies by few columns up to three times faster than by as many rows."""


class Linear(nn.Linear):
    """As `torch.nn.Linear`: maps (..., in) to (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W^T + b."""
        if (
            torch.compiler.is_compiling()  # to it the number of rows is a symbol, in no range
            or torch.is_grad_enabled()
            or x.device.type != "cpu"
            or (rows := x.shape[:-1].numel()) not in FEW_ROWS
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        columns = x.reshape(rows, -1).mT
        if self.bias is None:
            out = torch.mm(self.weight, columns)
        else:
            out = torch.addmm(self.bias[:, None], self.weight, columns)
        return out.mT.contiguous().unflatten(0, x.shape[:-1])
