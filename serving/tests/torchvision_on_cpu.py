"""torchvision's wheel is built for CUDA torch: beside a CPU build its import wants two operators that are not there."""

import importlib.abc
import sys


class Operators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch._torchvision_operators = self  # or they would go with it


sys.meta_path.insert(0, Operators())
